"""Every knob against a plain numpy sampler that sorts the whole vocabulary, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loramux.engine import sampler
from loramux.engine.sampler import sample
from loramux.engine.sequence import Sequence
from loramux.engine.uniform import _mix, uniform

from .test_kv_cache import sequence

V = 300
KNOBS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3, "min_p": 0.05},
    {"temperature": 2.5, "top_k": 7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 100000},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.5, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"temperature": 0.9, "repetition_penalty": 0.5, "top_k": 3},
    {"frequency_penalty": 1.5},
    {"presence_penalty": 2.0, "temperature": 0.7},
    {"logit_bias": {5: 100.0}},
    {"logit_bias": {5: -100.0, 6: 3.5}, "temperature": 1.0, "top_p": 0.9},
    {"min_new_tokens": 100, "stop_token_ids": frozenset({0, 1, 2}), "ignore_eos": False},
    {"temperature": 1e-5, "top_p": 0.9},
]


def _sequence(seed: int, output: int = 6, **knobs: Any) -> Sequence:
    random = np.random.default_rng(seed)
    seq = sequence(random.integers(0, V, 10).tolist(), **knobs)
    seq.tokens.extend(random.integers(0, 20, output).tolist())  # few values: they repeat
    seq.group.seed = seed
    return seq


def _reference(logits: np.ndarray, seq: Sequence) -> int:
    """The documented rules, written down naively."""
    p = seq.group.request.sampling
    x = logits.astype(np.float32)
    tokens = list(seq.tokens)
    output = tokens[len(seq.group.request.prompt_ids) :]
    for t in set(tokens):
        scale = np.float32(p.repetition_penalty)
        x[t] = x[t] / scale if x[t] > 0 else x[t] * scale
    for t in set(output):
        x[t] -= np.float32(p.frequency_penalty * output.count(t) + p.presence_penalty)
    for t, bias in p.logit_bias.items():
        x[t] += np.float32(bias)
    if len(output) < p.min_new_tokens:
        x[list(seq.group.ending_ids)] = -np.inf
    if p.temperature < 1e-5:
        return int(x.argmax())
    scaled = (x - x.max()) / np.float32(p.temperature)
    probs = np.exp(scaled.astype(np.float64))
    probs /= probs.sum()
    draw = uniform(seq.group.seed, seq.index, len(output))
    if p.top_k == 0 and p.top_p == 1.0:
        kept = np.arange(len(x))[probs >= p.min_p * probs.max()]
    else:
        order = np.argsort(-x, kind="stable")
        order = order[: p.top_k or len(x)]
        mass = probs[order] / probs[order].sum()
        before = np.concatenate([[0.0], np.cumsum(mass)[:-1]])
        order = order[before < p.top_p]
        kept = order[probs[order] >= p.min_p * probs[order[0]]]
    cumulative = np.cumsum(probs[kept])
    return int(kept[np.searchsorted(cumulative, draw * cumulative[-1], side="right")])


def _rows(trial: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[Sequence]]:
    logits = torch.from_numpy(np.random.default_rng(trial).normal(0, 3, (len(KNOBS), V)).astype(np.float32))
    return logits.to(dtype), [_sequence(trial * 100 + i, **knobs) for i, knobs in enumerate(KNOBS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trial", range(12))
def test_mixed_rows_equal_the_reference(trial: int, dtype: torch.dtype) -> None:
    """bfloat16 logits have many ties, which must fall by token id."""
    logits, seqs = _rows(trial, dtype)
    got = [s.token_id for s in sample(logits, seqs) if s]
    want = [_reference(row.float().numpy(), seq) for row, seq in zip(logits, seqs, strict=True)]
    assert got == want


@pytest.mark.parametrize("trial", range(3))
def test_a_row_alone_gives_the_same_token(trial: int) -> None:
    logits, seqs = _rows(trial)
    together = sample(logits, seqs)
    assert together == [sample(logits[i : i + 1], [seqs[i]])[0] for i in range(len(seqs))]
    order = np.random.default_rng(trial).permutation(len(seqs)).tolist()
    assert [together[i] for i in order] == sample(logits[order], [seqs[i] for i in order])


@pytest.mark.parametrize("candidates", [1, 3, 50, V])
def test_nucleus_larger_than_the_candidates(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at a few candidates first is an optimisation only, also beside a row with a larger top-k."""
    monkeypatch.setattr(sampler, "NUCLEUS_CANDIDATES", candidates)
    for trial in range(5):
        logits, seqs = _rows(trial)
        want = [_reference(row.numpy(), seq) for row, seq in zip(logits, seqs, strict=True)]
        assert [s.token_id for s in sample(logits, seqs) if s] == want


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    seqs = [_sequence(i, output=i % 5, temperature=1.0) for i in range(4000)]
    counts = np.bincount([s.token_id for s in sample(logits, seqs) if s], minlength=4) / 4000
    assert counts == pytest.approx(logits[0].softmax(0).numpy(), abs=0.03)


def test_logits_are_only_read_and_logprobs_are_of_the_raw_ones() -> None:
    logits = torch.randn(2, V)
    before = logits.clone()
    plain = _sequence(1, logit_bias={9: 100.0}, temperature=0.5, top_logprobs=2, repetition_penalty=2.0)
    silent = _sequence(2, presence_penalty=1.0)
    first, second = sample(logits, [plain, silent])
    assert torch.equal(logits, before)
    assert first is not None
    assert second is not None
    lp = logits[0].log_softmax(0)
    assert first.token_id == 9
    assert first.logprob == pytest.approx(float(lp[9]))
    assert [t for t, _ in first.top] == lp.topk(2).indices.tolist()
    assert (second.logprob, second.top) == (None, ())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("knobs", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_logprobs": 1}])
def test_a_row_that_is_not_finite_is_none_and_alone(bad: float, knobs: dict[str, Any]) -> None:
    logits, seqs = _rows(0)
    want = sample(logits, seqs)
    broken = torch.cat([logits, logits[:1]])
    broken[-1, 17] = bad
    assert sample(broken, [*seqs, _sequence(5, **knobs)]) == [*want, None]


def test_nothing_left_to_choose_is_none() -> None:
    everything = frozenset(range(V))
    seq = _sequence(1, min_new_tokens=50, stop_token_ids=everything, temperature=1.0)
    assert sample(torch.randn(1, V), [seq]) == [None]


def test_draws_of_neighbours_are_unrelated() -> None:
    draws = np.array([uniform(seed, i, p) for seed in range(10) for i in range(10) for p in range(40)])
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert len(set(draws.tolist())) == len(draws)
    assert np.histogram(draws, bins=8, range=(0, 1))[0] == pytest.approx(500, abs=90)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05
    assert _mix(0) == 0xE220A8397B1DCDAF  # splitmix64's published first output for seed 0
    assert uniform(1, 2, 3) == 0.814259011529328, "a promise: same seed, same text, in every version"

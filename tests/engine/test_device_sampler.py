"""What is sampled from a device's logits equals what the host samples, by the same plain numpy sampler.

The device is a CUDA device if there is one, else the CPU, with the kernel interpreted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loramux.engine import device_sampler, sampler
from loramux.engine.device_sampler import OneCopy, sample_on_device
from loramux.engine.sampler import Sampled, sample
from loramux.ops.greedy import Greedy, greedy, select_greedy

from tests.ops.triton_device import DEVICE

from .test_sampler import KNOBS, V, _reference, _rows, _sequence


def kernel() -> Greedy:
    pytest.importorskip("triton")
    from loramux.ops.cuda import sampling

    return sampling.greedy


@pytest.fixture(params=["torch", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to find the likeliest tokens."""
    chosen = greedy if request.param == "torch" else kernel()
    monkeypatch.setattr(device_sampler, "select_greedy", lambda device: chosen)


def assert_equal(got: list[Sampled | None], want: list[Sampled | None]) -> None:
    """Log probabilities may be summed in another order; among equal ones the listed tokens may be others."""
    assert [s and s.token_id for s in got] == [s and s.token_id for s in want]
    for a, b in zip(got, want, strict=True):
        if a is not None and b is not None:
            assert (a.logprob is None) == (b.logprob is None)
            assert a.logprob == (b.logprob and pytest.approx(b.logprob, rel=1e-4, abs=1e-5))
            assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], rel=1e-4, abs=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trial", range(4))
def test_mixed_rows_equal_the_reference(trial: int, dtype: torch.dtype) -> None:
    """All knobs in one step; bfloat16 logits have many ties."""
    logits, seqs = _rows(trial, dtype)
    before = logits.clone()
    got = [s and s.token_id for s in sample_on_device(logits.to(DEVICE), seqs)]
    assert got == [_reference(row.float().numpy(), seq) for row, seq in zip(logits, seqs, strict=True)]
    assert torch.equal(logits, before)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("told", [{"logprobs": True}, {"top_logprobs": 3}, {"top_logprobs": 2 * V}])
@pytest.mark.parametrize("trial", range(2))
def test_log_probabilities_are_those_of_the_host(trial: int, told: dict[str, Any]) -> None:
    """For every second row of each kind: the others get none."""
    logits, _ = _rows(trial)
    seqs = [_sequence(trial * 100 + i, **knobs, **(told if i % 2 else {})) for i, knobs in enumerate(KNOBS)]
    want = sample(logits, seqs)
    assert sum(s is not None and s.logprob is not None for s in want) == len(KNOBS) // 2
    assert_equal(sample_on_device(logits.to(DEVICE), seqs), want)


@pytest.mark.usefixtures("way")
def test_more_rows_than_a_group_has_and_each_alone() -> None:
    drawn = [{"temperature": 1.0}, {"temperature": 1.0, "top_k": 9}, {"presence_penalty": 2.0}, {}]
    seqs = [_sequence(i, **drawn[i % 4]) for i in range(4 * device_sampler._ROWS + 7)]
    logits = torch.randn(len(seqs), V, generator=torch.Generator().manual_seed(1))
    together = sample_on_device(logits.to(DEVICE), seqs)
    assert_equal(together, sample(logits, seqs))
    for i in range(0, len(seqs), 13):
        assert sample_on_device(logits[i : i + 1].to(DEVICE), [seqs[i]])[0] == together[i]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("candidates", [1, 3, 50, V])
def test_nucleus_larger_than_the_candidates(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "NUCLEUS_CANDIDATES", candidates)
    monkeypatch.setattr(device_sampler, "MOST_CANDIDATES", 60)
    for trial in range(2):
        logits, seqs = _rows(trial)
        want = [_reference(row.numpy(), seq) for row, seq in zip(logits, seqs, strict=True)]
        assert [s and s.token_id for s in sample_on_device(logits.to(DEVICE), seqs)] == want


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, V - 1])
def test_a_row_that_is_not_finite_is_none_and_alone(bad: float, place: int) -> None:
    """Of every kind, each beside a sound one."""
    logits, seqs = _rows(0)
    want = sample(logits, seqs)
    broken = logits.clone()
    broken[:, place] = bad
    got = sample_on_device(torch.cat([logits, broken]).to(DEVICE), seqs + seqs)
    assert got == want + [None] * len(seqs)
    told = _sequence(1, temperature=1.0, top_logprobs=2)
    assert sample_on_device(torch.full((1, V), bad, device=DEVICE), [told]) == [None]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("knobs", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 4}])
def test_nothing_left_to_choose_is_none(knobs: dict[str, Any]) -> None:
    seq = _sequence(1, min_new_tokens=50, stop_token_ids=frozenset(range(V)), **knobs)
    assert sample_on_device(torch.randn(1, V, device=DEVICE), [seq]) == [None]


def test_a_step_of_prompt_chunks_computes_nothing() -> None:
    assert sample_on_device(torch.empty(0, V, device=DEVICE), []) == []


@pytest.mark.parametrize("knobs", [KNOBS, [{}]])
def test_one_copy_a_step(knobs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of all kinds, as long as no nucleus is wider than the candidates; and a greedy step moves no logits."""
    sizes: list[int] = []
    cpu = torch.Tensor.cpu

    def counting(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return cpu(tensor)

    monkeypatch.setattr(device_sampler, "select_greedy", lambda device: greedy)
    monkeypatch.setattr(sampler, "NUCLEUS_CANDIDATES", V)
    logits = torch.randn(len(knobs), V, device=DEVICE)
    seqs = [_sequence(i, **k) for i, k in enumerate(knobs)]
    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    sample_on_device(logits, seqs)
    assert len(sizes) == 1
    if len(knobs) == 1:
        assert sizes == [8 + 1 + 4]


def test_tensors_of_all_kinds_come_back_as_they_were() -> None:
    tensors = [
        torch.tensor([True, False, True], device=DEVICE),
        torch.randn(3, 4, device=DEVICE)[:, ::2],
        torch.tensor([[1 << 40], [-7]], device=DEVICE),
        torch.empty(2, 0, device=DEVICE),
        torch.tensor([False], device=DEVICE),
    ]
    copy = OneCopy()
    assert [copy.take(t) for t in tensors] == list(range(5))
    for array, tensor in zip(copy.bring(), tensors, strict=True):
        np.testing.assert_array_equal(array, tensor.cpu().numpy())


def test_logits_on_a_device_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sampler, "sample_on_device", lambda logits, seqs: [Sampled(7)] * len(seqs))
    assert sample(torch.empty(1, V, device="meta"), [_sequence(0)]) == [Sampled(7)]
    logits = torch.zeros(1, V)
    logits[0, 3] = 1.0
    assert sample(logits, [_sequence(0)]) == [Sampled(3)]


def test_a_device_without_triton_chooses_with_torch(caplog: pytest.LogCaptureFixture) -> None:
    """Here nothing can be allocated on a CUDA device, which is one way to fail; said once."""
    if DEVICE.type == "cuda":
        pytest.skip("there is a device")
    select_greedy.cache_clear()
    assert select_greedy(torch.device("cuda")) is greedy
    assert select_greedy(torch.device("cuda")) is greedy
    assert len(caplog.records) == 1
    assert "Triton is not available" in caplog.text
    select_greedy.cache_clear()

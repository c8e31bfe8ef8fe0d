"""Logits → tokens, each row by its own request's rules, with the same result whatever the other rows are.

Order of the rules (all in float32): repetition, frequency and presence penalties; logit bias; end tokens
masked until min_new_tokens; then temperature, top-k, top-p (of what top-k left, renormalised), min-p
(relative to the likeliest). A token is drawn by inverting the cumulative distribution (float64, summed in
order) at `uniform(seed, index, position)`:

- without top-k and top-p, in the order of the vocabulary: no sort is needed;
- with them, by falling logit, equal logits by rising id. Both filters and min-p then only say how many tokens
  from the front are kept, so the largest K values are enough and the vocabulary is not sorted.

Log probabilities are of the raw logits. Logits on the CPU are sampled here, those of another device by
`engine.device_sampler`, to the same rules. Knows nothing of text or of scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loramux.engine.sequence import Sequence
from loramux.engine.uniform import uniform

MIN_TEMPERATURE = 1e-5  # below it the distribution is a point in float32: greedy
NUCLEUS_CANDIDATES = 256  # top-p alone looks at so many tokens first, at all only if these do not reach p


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; `logprob` and `top` (likeliest first) only if the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def sample(logits: Tensor, seqs: list[Sequence]) -> list[Sampled | None]:
    """One token for each row of logits [R, V] (any float dtype, only read); None: the row is not finite."""
    if logits.device.type != "cpu":
        from loramux.engine.device_sampler import sample_on_device  # which comes back here for rows that it cannot do

        return sample_on_device(logits, seqs)
    raw = logits.float()
    chosen_from = _apply_rules(raw, seqs)
    largest, tokens = _largest(chosen_from)
    # A sum is finite only if every addend is: one pass, no mask of the size of the logits. A row that the
    # rules leave without any token has no finite maximum.
    sound = (raw.sum(dim=1).isfinite() & largest.isfinite()).tolist()
    chosen = tokens.tolist()
    for i, seq in enumerate(seqs):
        if sound[i] and not is_greedy(seq):
            chosen[i] = _draw(chosen_from[i], seq)
    results: list[Sampled | None] = [Sampled(token) if ok else None for token, ok in zip(chosen, sound, strict=True)]
    _add_logprobs(results, raw, seqs)
    return results


def is_greedy(seq: Sequence) -> bool:
    """Whether its token is the likeliest, not a drawn one."""
    return seq.group.request.sampling.temperature < MIN_TEMPERATURE


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest value and its place, [R] each; of equal ones the first, as documented."""
    places = torch.from_numpy(logits.numpy().argmax(axis=1))  # ten times as fast as torch's
    return logits.gather(1, places[:, None])[:, 0], places


def _apply_rules(raw: Tensor, seqs: list[Sequence]) -> Tensor:
    """The logits to choose from; `raw` itself if no request changes any."""
    touched = [i for i, seq in enumerate(seqs) if changes_logits(seq)]
    if not touched:
        return raw
    logits = raw.clone()
    for i in touched:
        apply_row_rules(logits[i], seqs[i])
    return logits


def changes_logits(seq: Sequence) -> bool:
    """Whether `apply_row_rules` would change anything now."""
    p = seq.group.request.sampling
    penalized = p.repetition_penalty != 1.0 or p.frequency_penalty != 0.0 or p.presence_penalty != 0.0
    return penalized or bool(p.logit_bias) or seq.num_output < p.min_new_tokens


def apply_row_rules(row: Tensor, seq: Sequence) -> None:
    """Change one row [V], float32, in place; on any device, without waiting for it."""
    p = seq.group.request.sampling
    if p.repetition_penalty != 1.0:
        ids = _on(row, np.array(seq.tokens))  # one that is there twice gets the same value twice
        seen = row[ids]
        row[ids] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
    if p.frequency_penalty != 0.0 or p.presence_penalty != 0.0:
        output = np.array(seq.tokens[len(seq.tokens) - seq.num_output :], dtype=np.int64)
        unique, counts = np.unique(output, return_counts=True)
        penalty = (p.frequency_penalty * counts + p.presence_penalty).astype(np.float32)
        row[_on(row, unique)] -= _on(row, penalty)
    tables = seq.group.tables
    if len(tables.biased):
        row[_on(row, tables.biased)] += _on(row, tables.biases)
    if seq.num_output < p.min_new_tokens and len(tables.ending):
        row[_on(row, tables.ending)] = float("-inf")


def _on(like: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(like.device, non_blocking=True)


def _draw(logits: Tensor, seq: Sequence) -> int:
    """A token id by the logits [V], float32, on the CPU."""
    p = seq.group.request.sampling
    # The maximum goes first, lest a small temperature overflow.
    scaled = (logits - logits.amax()) / torch.tensor(p.temperature, dtype=torch.float32)
    probs = scaled.softmax(dim=0)
    if p.top_k > 0 or p.top_p < 1.0:
        return _draw_from_front(logits.numpy(), probs.numpy(), seq, NUCLEUS_CANDIDATES)
    if p.min_p > 0.0:
        values = probs.numpy()
        values *= values >= np.float32(p.min_p) * values.max()
    return _invert(probs.cumsum(dim=0, dtype=torch.float64).numpy(), seq)


def _draw_from_front(logits: np.ndarray, probs: np.ndarray, seq: Sequence, candidates: int) -> int:
    """A token id with top-k or top-p, by logits and probabilities [V]. Without top-k it looks at the likeliest
    `candidates` first, and at more only if these do not reach p."""
    ids = _front(logits, min(seq.group.request.sampling.top_k or candidates, len(probs)))
    place = choose_from_front(probs[ids], seq, whole=len(ids) == len(probs))
    if place is None:
        return _draw_from_front(logits, probs, seq, candidates * 8)
    return int(ids[place])


def choose_from_front(front: np.ndarray, seq: Sequence, *, whole: bool) -> int | None:
    """A place in `front`, the probabilities of the likeliest tokens [C] by falling logit: top_k of them if there is a
    top-k. None: without one, they do not reach p and are not the whole vocabulary."""
    p = seq.group.request.sampling
    cumulative = front.cumsum(dtype=np.float64)
    target = (cumulative[-1] if p.top_k else 1.0) * p.top_p
    if not p.top_k and cumulative[-1] < target and not whole:
        return None
    kept = min(1 + int(np.searchsorted(cumulative, target)), len(front))
    likely = int(np.count_nonzero(front >= np.float32(p.min_p) * front[0]))
    return _invert(cumulative[: max(1, min(kept, likely))], seq)


def _front(logits: np.ndarray, count: int) -> np.ndarray:
    """The ids of the first `count` places of a stable sort by falling logit [V]: equal logits by rising id."""
    smallest = np.partition(logits, len(logits) - count)[len(logits) - count]
    ids = np.flatnonzero(logits >= smallest)
    # One sort of distinct integers, several times as fast as a stable sort of floats. A float's bits are ordered
    # like itself once the lower ones of negative floats are flipped; 0 - x turns the order and has no -0.
    bits = (0.0 - logits[ids]).view(np.int32)
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64) << 32 | ids
    keys.sort()
    return keys[:count] & 0xFFFFFFFF


def _invert(cumulative: np.ndarray, seq: Sequence) -> int:
    """The first place where the cumulative mass [N] exceeds u times its total, below the total itself."""
    total = cumulative[-1]
    target = min(total * uniform(seq.group.seed, seq.index, seq.num_output), np.nextafter(total, 0.0))
    return int(np.searchsorted(cumulative, target, side="right"))


def _add_logprobs(results: list[Sampled | None], raw: Tensor, seqs: list[Sequence]) -> None:
    """Fill in what the requests asked for."""
    rows = [i for i, seq in enumerate(seqs) if results[i] is not None and wants_logprobs(seq)]
    if not rows:
        return
    logprobs = raw[rows].log_softmax(dim=1)
    most = min(max(seqs[i].group.request.sampling.top_logprobs for i in rows), raw.shape[1])
    values, ids = (t.tolist() for t in logprobs.topk(most, dim=1))
    for i, row, top_ids, top_values in zip(rows, logprobs, ids, values, strict=True):
        count = seqs[i].group.request.sampling.top_logprobs
        token = results[i]
        assert token is not None
        top = tuple(zip(top_ids[:count], top_values[:count], strict=True))
        results[i] = Sampled(token.token_id, float(row[token.token_id]), top)


def wants_logprobs(seq: Sequence) -> bool:
    """Whether its request asked for any."""
    p = seq.group.request.sampling
    return p.logprobs or p.top_logprobs > 0

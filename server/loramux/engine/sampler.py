"""Logits → tokens, each row by its own request's rules, with the same result whatever the other rows are.

Order of the rules (all in float32): repetition, frequency and presence penalties; logit bias; end tokens
masked until min_new_tokens; then temperature, top-k, top-p (of what top-k left, renormalised), min-p
(relative to the likeliest). A token is drawn by inverting the cumulative distribution (float64, summed in
order) at `uniform(seed, index, position)`:

- without top-k and top-p, in the order of the vocabulary: no sort is needed;
- with them, by falling logit, equal logits by rising id. Both filters and min-p then only say how many tokens
  from the front are kept, so the largest K values are enough and the vocabulary is not sorted.

Log probabilities are of the raw logits. Works on any device. Knows nothing of text or of scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loramux.engine.sequence import Sequence
from loramux.engine.uniform import uniform

MIN_TEMPERATURE = 1e-5  # below it the distribution is a point in float32: greedy
NUCLEUS_CANDIDATES = 1024  # top-p alone looks at so many tokens first, at all only if these do not reach p


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; `logprob` and `top` (likeliest first) only if the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def sample(logits: Tensor, seqs: list[Sequence]) -> list[Sampled | None]:
    """One token for each row of logits [R, V] (any float dtype, only read); None: the row is not finite."""
    raw = logits.float()
    chosen_from = _apply_rules(raw, seqs)
    largest, tokens = chosen_from.max(dim=1)  # of equal ones the first, as documented
    # A sum is finite only if every addend is: one pass, no mask of the size of the logits. A row that the
    # rules leave without any token has no finite maximum.
    sound = (raw.sum(dim=1).isfinite() & largest.isfinite()).tolist()
    drawn = [i for i, seq in enumerate(seqs) if sound[i] and not _is_greedy(seq)]
    plain = [i for i in drawn if not _has_cutoff(seqs[i])]
    cut = [i for i in drawn if _has_cutoff(seqs[i])]
    if plain:
        tokens[plain] = _draw(chosen_from[plain], [seqs[i] for i in plain])
    if cut:
        tokens[cut] = _draw_from_front(chosen_from[cut], [seqs[i] for i in cut], NUCLEUS_CANDIDATES)
    results: list[Sampled | None] = [
        Sampled(token) if ok else None for token, ok in zip(tokens.tolist(), sound, strict=True)
    ]
    _add_logprobs(results, raw, seqs)
    return results


def _is_greedy(seq: Sequence) -> bool:
    return seq.group.request.sampling.temperature < MIN_TEMPERATURE


def _has_cutoff(seq: Sequence) -> bool:
    p = seq.group.request.sampling
    return p.top_k > 0 or p.top_p < 1.0


def _apply_rules(raw: Tensor, seqs: list[Sequence]) -> Tensor:
    """The logits to choose from; `raw` itself if no request changes any."""
    touched = [i for i, seq in enumerate(seqs) if _changes_logits(seq)]
    if not touched:
        return raw
    logits = raw.clone()
    for i in touched:
        _apply_row_rules(logits[i], seqs[i])
    return logits


def _changes_logits(seq: Sequence) -> bool:
    p = seq.group.request.sampling
    penalized = p.repetition_penalty != 1.0 or p.frequency_penalty != 0.0 or p.presence_penalty != 0.0
    return penalized or bool(p.logit_bias) or seq.num_output < p.min_new_tokens


def _apply_row_rules(row: Tensor, seq: Sequence) -> None:
    """Change one row [V] in place."""
    p = seq.group.request.sampling
    if p.repetition_penalty != 1.0:
        ids = _on(row, np.unique(np.array(seq.tokens)))
        seen = row[ids]
        row[ids] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
    if p.frequency_penalty != 0.0 or p.presence_penalty != 0.0:
        output = np.array(seq.tokens[len(seq.tokens) - seq.num_output :], dtype=np.int64)
        unique, counts = np.unique(output, return_counts=True)
        penalty = (p.frequency_penalty * counts + p.presence_penalty).astype(np.float32)
        row[_on(row, unique)] -= _on(row, penalty)
    if p.logit_bias:
        row[_on(row, np.array(list(p.logit_bias), dtype=np.int64))] += _on(
            row, np.array(list(p.logit_bias.values()), dtype=np.float32)
        )
    if seq.num_output < p.min_new_tokens and seq.group.ending_ids:
        row[_on(row, np.array(sorted(seq.group.ending_ids), dtype=np.int64))] = float("-inf")


def _on(like: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(like.device)


def _draw(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    """Rows without top-k and top-p: [N, V] → token ids [N]."""
    probs = _probabilities(logits, seqs)
    min_p = _column(probs, [seq.group.request.sampling.min_p for seq in seqs], torch.float32)
    probs = probs.masked_fill_(probs < min_p * probs.amax(dim=1, keepdim=True), 0.0)
    cumulative = probs.cumsum(dim=1, dtype=torch.float64)
    return _invert(cumulative, cumulative[:, -1:], seqs)[:, 0]


def _draw_from_front(logits: Tensor, seqs: list[Sequence], candidates: int) -> Tensor:
    """Rows with top-k or top-p: [N, V] → token ids [N]. `candidates`: how many to look at without top-k."""
    params = [seq.group.request.sampling for seq in seqs]
    vocab = logits.shape[1]
    limits = [min(p.top_k or candidates, vocab) for p in params]
    values, ids = logits.topk(max(limits), dim=1)
    probs = _probabilities(logits, seqs).gather(1, ids)
    cumulative = probs.cumsum(dim=1, dtype=torch.float64)
    limit = _column(probs, limits, torch.int64)
    has_k = _column(probs, [p.top_k > 0 for p in params], torch.bool)
    mass = torch.where(has_k, cumulative.gather(1, limit - 1), torch.ones_like(cumulative[:, :1]))
    target = mass * _column(probs, [p.top_p for p in params], torch.float64)
    reached = cumulative >= target
    # Not reached within the row's own candidates: how far `values` goes depends on the other rows.
    uncovered = (~(has_k | reached.gather(1, limit - 1))[:, 0]).tolist()
    min_p = _column(probs, [p.min_p for p in params], torch.float32)
    kept = torch.minimum(limit, 1 + (~reached).sum(dim=1, keepdim=True))
    kept = torch.minimum(kept, (probs >= min_p * probs[:, :1]).sum(dim=1, keepdim=True)).clamp_(min=1)
    rank = _invert(cumulative, cumulative.gather(1, kept - 1), seqs)
    tokens = _id_of_rank(logits, values, rank)
    again = [i for i, missing in enumerate(uncovered) if missing and limits[i] < vocab]
    if again:
        tokens[again] = _draw_from_front(logits[again], [seqs[i] for i in again], vocab)
    return tokens


def _probabilities(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    """Softmax at each row's temperature. The maximum goes first, lest a small temperature overflow."""
    temperature = _column(logits, [seq.group.request.sampling.temperature for seq in seqs], torch.float32)
    return ((logits - logits.amax(dim=1, keepdim=True)) / temperature).softmax(dim=1)


def _invert(cumulative: Tensor, total: Tensor, seqs: list[Sequence]) -> Tensor:
    """The first place [N, 1] where the cumulative mass exceeds u x total, below total itself."""
    draws = [uniform(seq.group.seed, seq.index, seq.num_output) for seq in seqs]
    target = torch.minimum(total * _column(total, draws, torch.float64), total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)


def _id_of_rank(logits: Tensor, values: Tensor, rank: Tensor) -> Tensor:
    """The token at place `rank` [N, 1] of a stable sort by falling logit: equal logits by rising id."""
    value = values.gather(1, rank)
    place = rank - (values > value).sum(dim=1, keepdim=True)
    rows, ids = (logits == value).nonzero(as_tuple=True)  # by row, then by id
    first = torch.searchsorted(rows, torch.arange(len(logits), device=rows.device))
    return ids[first + place[:, 0]]


def _column(like: Tensor, values: list[float] | list[int] | list[bool], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _add_logprobs(results: list[Sampled | None], raw: Tensor, seqs: list[Sequence]) -> None:
    """Fill in what the requests asked for."""
    rows = [i for i, seq in enumerate(seqs) if results[i] is not None and _wants_logprobs(seq)]
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


def _wants_logprobs(seq: Sequence) -> bool:
    p = seq.group.request.sampling
    return p.logprobs or p.top_logprobs > 0

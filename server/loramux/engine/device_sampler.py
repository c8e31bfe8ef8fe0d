"""Logits that are on a device → tokens, by the rules of `engine.sampler`, with one copy to the host a step.

The copy is small: a greedy row is a token, a row with top-k or top-p its likeliest tokens and their probabilities, of
which one is drawn on the host as the sampler draws it, and a row with neither is drawn on the device. What that way is
too narrow for (a top-k of thousands, a nucleus wider than the candidates) is brought as a row and sampled on the host.

Differs from the host's results only as far as the device's softmax and sums round differently.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loramux.engine import sampler
from loramux.engine.request import SamplingParams
from loramux.engine.sampler import Sampled
from loramux.engine.sequence import Sequence
from loramux.engine.uniform import uniform
from loramux.ops.greedy import select_greedy

MOST_CANDIDATES = 1024  # a larger top-k brings the whole row
_ROWS = 16  # rows of a group, whose temporaries take 20 bytes a logit or so
_NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.bool: np.bool_}


class OneCopy:
    """Tensors that go to the host together, in one copy and so with one wait."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def take(self, tensor: Tensor) -> int:
        """Its place in what `bring` returns; int64, float32 or bool."""
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def bring(self) -> list[np.ndarray]:
        """Waits for the device."""
        pieces = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in self._tensors]
        data = torch.cat(pieces).cpu().numpy()
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        return [
            data[end - len(piece) : end].view(_NUMPY[tensor.dtype]).reshape(tensor.shape)
            for tensor, piece, end in zip(self._tensors, pieces, ends, strict=True)
        ]


class Way(enum.Enum):
    """How a row's token comes about."""

    TOKEN = enum.auto()  # the greedy token of the raw logits, and no top logprobs
    GREEDY = enum.auto()
    DRAW = enum.auto()  # on the device
    FRONT = enum.auto()  # on the host, from the likeliest tokens
    ROW = enum.auto()  # on the host, from the whole row


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are sampled in the same way, S of them. All but `rows` are places in a OneCopy.

    tokens    int64 [S, C], one of them is the row's; by falling logit
    sound     bool [S]
    probs     float32 [S, C] of tokens, after temperature and over all the vocabulary: the host draws. None: C is 1
    logprobs  float32 [S, C] of tokens, of the raw logits; with `top`: int64 and float32 [S, M], the likeliest first.
              None if no row of the group wants them
    """

    rows: list[int]
    tokens: int
    sound: int
    probs: int | None = None
    logprobs: int | None = None
    top: tuple[int, int] | None = None


@torch.inference_mode()
def sample_on_device(logits: Tensor, seqs: list[Sequence]) -> list[Sampled | None]:
    """See `sampler.sample`; logits [R, V] on any device, only read."""
    if not seqs:
        return []
    rows: dict[Way, list[int]] = {way: [] for way in Way}
    for i, seq in enumerate(seqs):
        rows[_way(seq, logits.shape[1])].append(i)
    step = Step(logits, seqs)
    groups = [
        sampled(members[first : first + _ROWS])
        for way, sampled in ((Way.GREEDY, step.greedy), (Way.DRAW, step.draw), (Way.FRONT, step.front))
        for members in [rows[way]]
        for first in range(0, len(members), _ROWS)
    ]
    arrays = step.copy.bring()
    ids, sound, logprobs = (arrays[place].tolist() for place in step.plain)
    results: list[Sampled | None] = [None] * len(seqs)
    for i in rows[Way.TOKEN]:
        if sound[i]:
            results[i] = Sampled(ids[i], logprobs[i] if sampler.wants_logprobs(seqs[i]) else None)
    left = [i for i in rows[Way.ROW] if sound[i]]
    for group in groups:
        left += _conclude(group, arrays, seqs, results, logits.shape[1])
    for i in left:
        results[i] = sampler.sample(logits[i : i + 1].cpu(), [seqs[i]])[0]
    return results


class Step:
    """What is computed of one step's logits on the device. Nothing here waits for it."""

    def __init__(self, logits: Tensor, seqs: list[Sequence]) -> None:
        self._logits = logits
        self._seqs = seqs
        self._ids, self._finite, logprobs = select_greedy(logits.device)(logits)
        self.copy = OneCopy()
        self.plain = tuple(map(self.copy.take, (self._ids, self._finite, logprobs)))

    def greedy(self, rows: list[int]) -> Group:
        """Tokens that rules may have changed, or with top logprobs."""
        at = self._on(rows, torch.int64)
        if not any(sampler.changes_logits(self._seqs[i]) for i in rows):
            return self._group(rows, at, self._ids[at][:, None], self._finite[at])
        largest, tokens = self._chosen_from(rows, at).max(dim=1)  # of equal ones the first, as documented
        return self._group(rows, at, tokens[:, None], self._finite[at] & largest.isfinite())

    def draw(self, rows: list[int]) -> Group:
        """As the host draws without top-k and top-p: inverts the distribution in the vocabulary's order."""
        at = self._on(rows, torch.int64)
        probs, largest = self._probs(rows, self._chosen_from(rows, at))
        least = self._on([[p.min_p] for p in self._knobs(rows)], torch.float32)
        probs *= probs >= least * probs.amax(dim=1, keepdim=True)
        cumulative = probs.cumsum(dim=1, dtype=torch.float64)
        total = cumulative[:, -1:].contiguous()
        draws = [[uniform(s.group.seed, s.index, s.num_output)] for s in (self._seqs[i] for i in rows)]
        target = torch.minimum(total * self._on(draws, torch.float64), total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, target, right=True)
        tokens.clamp_(max=probs.shape[1] - 1)  # in a row of NaN nothing is found
        return self._group(rows, at, tokens, self._finite[at] & largest.isfinite())

    def front(self, rows: list[int]) -> Group:
        """As many tokens of each row as one of them needs."""
        at = self._on(rows, torch.int64)
        chosen_from = self._chosen_from(rows, at)
        # The keys of `sampler._front`: distinct, so that equal logits fall by rising id whatever topk does.
        bits = (0.0 - chosen_from).view(torch.int32)
        keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(torch.int64) << 32
        keys |= torch.arange(keys.shape[1], device=keys.device)
        count = min(max(_candidates(self._seqs[i]) for i in rows), keys.shape[1])
        tokens = keys.topk(count, dim=1, largest=False, sorted=True).values & 0xFFFFFFFF
        probs, largest = self._probs(rows, chosen_from)
        return self._group(rows, at, tokens, self._finite[at] & largest.isfinite(), probs.gather(1, tokens))

    def _group(self, rows: list[int], at: Tensor, tokens: Tensor, sound: Tensor, probs: Tensor | None = None) -> Group:
        group = Group(
            rows, self.copy.take(tokens), self.copy.take(sound), None if probs is None else self.copy.take(probs)
        )
        if not any(sampler.wants_logprobs(self._seqs[i]) for i in rows):
            return group
        raw = self._logits.index_select(0, at).float().log_softmax(dim=1)
        values, ids = raw.topk(min(max(p.top_logprobs for p in self._knobs(rows)), raw.shape[1]), dim=1)
        return replace(
            group,
            logprobs=self.copy.take(raw.gather(1, tokens)),
            top=(self.copy.take(ids), self.copy.take(values)),
        )

    def _chosen_from(self, rows: list[int], at: Tensor) -> Tensor:
        """Float32 [S, V], a copy: the rows by their requests' rules."""
        chosen_from = self._logits.index_select(0, at).float()
        for row, i in zip(chosen_from, rows, strict=True):
            if sampler.changes_logits(self._seqs[i]):
                sampler.apply_row_rules(row, self._seqs[i])
        return chosen_from

    def _probs(self, rows: list[int], chosen_from: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [S, V] after temperature, and the largest logits [S]."""
        largest = chosen_from.amax(dim=1)
        temperatures = self._on([[p.temperature] for p in self._knobs(rows)], torch.float32)
        return ((chosen_from - largest[:, None]) / temperatures).softmax(dim=1), largest

    def _knobs(self, rows: list[int]) -> list[SamplingParams]:
        return [self._seqs[i].group.request.sampling for i in rows]

    def _on(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        """On the device, without waiting for it: a few bytes of ordinary memory are staged by the driver."""
        return torch.tensor(values, dtype=dtype).to(self._logits.device, non_blocking=True)


def _way(seq: Sequence, vocabulary: int) -> Way:
    p = seq.group.request.sampling
    if sampler.is_greedy(seq):
        return Way.GREEDY if sampler.changes_logits(seq) or p.top_logprobs > 0 else Way.TOKEN
    if p.top_k == 0 and p.top_p == 1.0:
        return Way.DRAW
    return Way.ROW if min(_candidates(seq), vocabulary) > MOST_CANDIDATES else Way.FRONT


def _candidates(seq: Sequence) -> int:
    return seq.group.request.sampling.top_k or sampler.NUCLEUS_CANDIDATES


def _conclude(
    group: Group, arrays: list[np.ndarray], seqs: list[Sequence], results: list[Sampled | None], vocabulary: int
) -> list[int]:
    """Fill in the results of the group's rows; returns those for which its candidates are too few."""
    too_few = []
    for s, i in enumerate(group.rows):
        if not arrays[group.sound][s]:
            continue
        place: int | None = 0
        if group.probs is not None:
            front = arrays[group.probs][s][: _candidates(seqs[i])]
            place = sampler.choose_from_front(front, seqs[i], whole=len(front) == vocabulary)
        if place is None:
            too_few.append(i)
            continue
        token = int(arrays[group.tokens][s, place])
        if group.logprobs is None or group.top is None or not sampler.wants_logprobs(seqs[i]):
            results[i] = Sampled(token)
            continue
        count = seqs[i].group.request.sampling.top_logprobs
        ids, values = (arrays[column][s, :count].tolist() for column in group.top)
        results[i] = Sampled(token, float(arrays[group.logprobs][s, place]), tuple(zip(ids, values, strict=True)))
    return too_few

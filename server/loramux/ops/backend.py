"""The few numeric operations a served model needs; each backend implements all of them.

`reference.py` is the truth; the others are compared with it, never with themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.ops.dense import DenseWeight
from loramux.ops.nf4 import NF4Weight
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.segment import LoraWeights, Segment


@dataclass(frozen=True, slots=True, eq=False)
class LinearPart:
    """One weight of a linear operation, [N, K] in NF4 or dense, and its bias [N] or None."""

    weight: NF4Weight | DenseWeight
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SiteSegment:
    """A segment as one linear operation sees it: the factors for each of its parts, None where there are none."""

    start: int
    stop: int
    weight: float
    parts: tuple[LoraWeights | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BoundSegments:
    """The segments of one step, prepared once for all linear operations of the step."""

    segments: tuple[Segment, ...]


class Linear(ABC):
    """One linear operation: the parts that share an input (q/k/v, gate/up), ready to run.

    `nbytes` and `numel` count what is in NF4, `dense_nbytes` and `dense_numel` the other parts; biases in neither.
    """

    nbytes: int
    numel: int
    dense_nbytes: int
    dense_numel: int

    @abstractmethod
    def __call__(self, x: Tensor, segments: BoundSegments) -> tuple[Tensor, ...]:
        """x [T, K] → [T, N_p] for each part, in x's dtype; see `Backend.linear`."""

    @abstractmethod
    def dequantize(self, part: int) -> Tensor:
        """A fresh float32 [N, K] of one part: to the bit the weight that `Backend.prepare` was given."""


class Backend(ABC):
    """Operations on flat batches: x is [T, features], without padding. Nothing given is written to, but caches.

    `batch_invariant` says that a row's result is the same to the last bit whatever the other rows are.
    """

    name: str
    batch_invariant: bool = False

    def prepare(self, parts: Sequence[LinearPart], sites: Sequence[int]) -> Linear:
        """Take over the weights of `parts`, which are the sites of these indices, for the model's whole life."""
        return PlainLinear(self, parts, sites)

    def bind(self, segments: tuple[Segment, ...]) -> BoundSegments:
        """Called once a step, before its linear operations."""
        return BoundSegments(segments)

    @abstractmethod
    def linear(self, x: Tensor, parts: Sequence[LinearPart], segments: Sequence[SiteSegment]) -> tuple[Tensor, ...]:
        """y_p = scale_p ⊙ (W_p·x + Σ weight·(B_p·(A_p·x) + lora_bias_p)) + bias_p for each part p.

        x [T, K] in float32, bfloat16 or float16; each y_p [T, N_p] in x's dtype. The parts share x (q/k/v, gate/up).
        The sum runs over the segments that cover the row; a row that none covers gets the base alone. The scale is
        that of the segment that covers the row, and 1 without one.
        """

    @abstractmethod
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: PagedBatch, shape: AttentionShape
    ) -> Tensor:
        """Write k and v into `cache` at batch.slots, then causal attention of each row over its own sequence.

        q [T, H, D], k [T, H_kv, D], v [T, H_kv, D_v], H a multiple of H_kv; returns [T, H, D_v].
        """


class PlainLinear(Linear):
    """Runs `Backend.linear` on the parts as they are."""

    def __init__(self, backend: Backend, parts: Sequence[LinearPart], sites: Sequence[int]) -> None:
        self._backend = backend
        self._parts = tuple(parts)
        self._sites = tuple(sites)
        dense = [part.weight for part in parts if isinstance(part.weight, DenseWeight)]
        nf4 = [part.weight for part in parts if isinstance(part.weight, NF4Weight)]
        self.nbytes, self.numel = sum(w.nbytes for w in nf4), sum(w.numel for w in nf4)
        self.dense_nbytes, self.dense_numel = sum(w.nbytes for w in dense), sum(w.numel for w in dense)

    def dequantize(self, part: int) -> Tensor:
        return self._parts[part].weight.dequantize(torch.float32)

    def __call__(self, x: Tensor, segments: BoundSegments) -> tuple[Tensor, ...]:
        bound = []
        for segment in segments.segments:
            parts = tuple(map(segment.sites.get, self._sites))
            if any(part is not None for part in parts):
                bound.append(SiteSegment(segment.start, segment.stop, segment.weight, parts))
        return self._backend.linear(x, self._parts, bound)

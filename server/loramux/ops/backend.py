"""The few numeric operations a served model needs; each backend implements all of them.

`reference.py` is the truth; the others are compared with it, never with themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from loramux.ops.nf4 import NF4Weight
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.segment import LoraWeights


@dataclass(frozen=True, slots=True, eq=False)
class LinearPart:
    """One weight of a linear operation: NF4 [N, K] and its bias [N] or None."""

    weight: NF4Weight
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SiteSegment:
    """A segment as one linear operation sees it: the factors for each of its parts, None where there are none."""

    start: int
    stop: int
    weight: float
    parts: tuple[LoraWeights | None, ...]


class Backend(ABC):
    """Operations on flat batches: x is [T, features], without padding. Nothing given is written to, but caches."""

    name: str

    @abstractmethod
    def linear(self, x: Tensor, parts: Sequence[LinearPart], segments: Sequence[SiteSegment]) -> tuple[Tensor, ...]:
        """y_p = W_p·x + bias_p + Σ weight·(B_p·(A_p·x) + lora_bias_p) for each part p.

        x [T, K] in float32, bfloat16 or float16; each y_p [T, N_p] in x's dtype. The parts share x (q/k/v, gate/up).
        The sum runs over the segments that cover the row; a row that none covers gets the base alone.
        """

    @abstractmethod
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: PagedBatch, shape: AttentionShape
    ) -> Tensor:
        """Write k and v into `cache` at batch.slots, then causal attention of each row over its own sequence.

        q [T, H, D], k [T, H_kv, D], v [T, H_kv, D_v], H a multiple of H_kv; returns [T, H, D_v].
        """

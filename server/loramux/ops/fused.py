"""What a backend offers beyond `Backend` so that a Llama-shaped model runs without transformers' Python in between.

`model/fused.py` and `model/shortcut.py` put a model together from these. A backend may compute a stack of layers in
one native call (ops/cpu) or as a row of launches (ops/cuda): here they are the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loramux.ops.backend import Backend, BoundSegments, Linear
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.segment import Segment


class FusedLinear(Linear):
    """A linear operation that gives its parts side by side.

    parts  how many they are
    width  output features of all of them
    """

    parts: int
    width: int

    @abstractmethod
    def run(self, x: Tensor, segments: BoundSegments) -> Tensor:
        """x [T, K] → [T, width] in x's dtype; see `Backend.linear`."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerOperations:
    """A Llama-shaped decoder layer: its linear operations, norms [hidden] with their epsilons, and its attention."""

    qkv: FusedLinear
    o: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    input_norm: Tensor
    input_epsilon: float
    post_attention_norm: Tensor
    post_attention_epsilon: float
    shape: AttentionShape


class Decoder(Protocol):
    """A stack of Llama-shaped layers."""

    def run(
        self,
        x: Tensor,
        cosines: Tensor,
        sines: Tensor,
        caches: Sequence[LayerCache],
        batch: PagedBatch,
        segments: BoundSegments,
    ) -> Tensor:
        """x [T, hidden], cosines and sines [T, dim], a cache a layer → [T, hidden]; writes keys and values."""
        ...


class FusingBackend(Backend):
    """A backend that has the parts of a Llama-shaped model.

    `widest_head` is the greatest head dimension that `decoder` takes; None: any.
    """

    widest_head: int | None = None

    @abstractmethod
    def norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """(s, rms_norm(s)·weight) with s = x + residual; all [T, features]. Without residual, s is x itself."""

    @abstractmethod
    def gate(self, both: Tensor) -> Tensor:
        """silu(both[:, :N])·both[:, N:] for both [T, 2N]."""

    @abstractmethod
    def prepare_dense(self, weight: Tensor, bias: Tensor | None) -> FusedLinear | None:
        """A dense [N, K] layer that no adapter changes (lm_head); None if it cannot be taken."""

    @abstractmethod
    def decoder(self, layers: Sequence[LayerOperations], heads: int, kv_heads: int, dim: int) -> Decoder:
        """The layers with `heads` and `kv_heads` of `dim`, none of which has a softcap or sinks."""


class CapturableBackend(FusingBackend):
    """A backend whose launches can be recorded once and replayed over other rows and other adapters: every operation
    reads lengths, tables and adapters from tensors, and of Python values only upper bounds."""

    @abstractmethod
    def reserve_segments(self, count: int, rows: int, max_rank: int, *, extras: bool) -> BoundSegments:
        """Room at addresses that stay for `count` segments, `rows` rows long in all, of adapters whose ranks are at
        most `max_rank`, with biases and scales if `extras`. Holds none yet."""

    @abstractmethod
    def rebind(self, segments: tuple[Segment, ...], into: BoundSegments) -> None:
        """Put `segments` in the place of those that `into`, from `reserve_segments`, holds. They must fit."""

    @abstractmethod
    def row_counts(self, most: int) -> tuple[int, ...]:
        """Numbers of rows up to `most`, such that a step of any other number up to `most` asks for no other kernel."""

    def precompile(self, rows: Sequence[int], ranks: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """Make the kernels ready that steps of so many rows take, alone and with adapters of so many ranks, where the
        passes that run each of them next (`model.warm_up`) would do so one after another. Need not do anything.

        progress(done, total) is called after each kernel.
        """

"""Triton kernels on a GPU, in bfloat16 and float16; what they do not take goes to the torch + bitsandbytes path."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from triton import knobs

from loramux.errors import StartupError
from loramux.ops.backend import BoundSegments, Linear, LinearPart
from loramux.ops.cuda import elementwise
from loramux.ops.cuda.attention import attention
from loramux.ops.cuda.dense import DenseLinear
from loramux.ops.cuda.linear import DENSE_ROWS, Operation, TritonLinear, can_overlap, row_counts
from loramux.ops.cuda.precompile import Heads, Shapes, compiled_before, precompile, steps
from loramux.ops.cuda.segments import TritonSegments, bind
from loramux.ops.fused import CapturableBackend, FusedLinear, LayerOperations
from loramux.ops.grouped import GroupedBackend
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.segment import Segment

log = logging.getLogger(__name__)

# Compiling takes some 300 MB a process.
_MOST_PROCESSES = 16
_DTYPES = (torch.bfloat16, torch.float16)


class TritonDecoder:
    """A stack of Llama-shaped layers as a row of launches, none of which waits for the device."""

    def __init__(
        self, layers: Sequence[LayerOperations], heads: int, kv_heads: int, dim: int, *, invariant: bool
    ) -> None:
        self._layers = tuple(layers)
        self._dim = dim
        self._widths = (heads * dim, kv_heads * dim, kv_heads * dim)
        self._invariant = invariant

    def run(
        self,
        x: Tensor,
        cosines: Tensor,
        sines: Tensor,
        caches: Sequence[LayerCache],
        batch: PagedBatch,
        segments: BoundSegments,
    ) -> Tensor:
        total, added = x, None
        for layer, cache in zip(self._layers, caches, strict=True):
            total, y = elementwise.norm(
                total if added is None else added,
                None if added is None else total,
                layer.input_norm,
                layer.input_epsilon,
            )
            qkv = layer.qkv.run(y, segments).split(self._widths, dim=1)
            q, k, v = (part.unflatten(1, (-1, self._dim)) for part in qkv)
            q = elementwise.rotate_and_store(q, k, v, cosines, sines, cache, batch.slots)
            attended = attention(q, k, v, cache, batch, layer.shape, invariant=self._invariant)
            added = layer.o.run(attended.flatten(1), segments)
            total, y = elementwise.norm(added, total, layer.post_attention_norm, layer.post_attention_epsilon)
            added = layer.down.run(elementwise.gate(layer.gate_up.run(y, segments)), segments)
        assert added is not None
        return total + added


class TritonBackend(CapturableBackend):
    """Reads NF4 weights, adapters and the paged cache where they lie.

    With `batch_invariant` every sum has one order whatever the batch, at some cost in speed.
    """

    def __init__(self, device: torch.device, *, batch_invariant: bool = False) -> None:
        """`device` may be the CPU if Triton's interpreter is on (for tests). Raises StartupError if no kernel can be
        compiled for it, for want of a place."""
        if device.type == "cuda":
            _require_cache()
        self.batch_invariant = batch_invariant
        self.name = "triton, batch invariant" if batch_invariant else "triton"
        self._device = device
        self._fallback = GroupedBackend()
        self._unbound = bind((), device)
        # What was prepared, for `precompile`.
        self._operations: set[Operation] = set()
        self._attentions: dict[Heads, None] = {}
        self._hidden, self._vocabulary, self._dtype = 64, 0, torch.bfloat16

    def prepare(self, parts: Sequence[LinearPart], sites: Sequence[int]) -> Linear:
        if TritonLinear.accepts(parts):
            linear = TritonLinear.pack(parts, sites, invariant=self.batch_invariant)
            self._operations.add(linear.operation)
            return linear
        if self.batch_invariant:
            raise StartupError(
                "--batch-invariant: this model has linear layers that the Triton kernels do not take (dense after a "
                "merge, or with an input width that is no multiple of 64), and others sum in an order that depends on "
                "the batch"
            )
        return super().prepare(parts, sites)

    def prepare_dense(self, weight: Tensor, bias: Tensor | None) -> FusedLinear | None:
        if weight.dtype not in _DTYPES or not weight.is_contiguous():
            return None
        self._vocabulary, self._dtype = weight.shape[0], weight.dtype
        return DenseLinear(weight, bias, invariant=self.batch_invariant)

    def row_counts(self, most: int) -> tuple[int, ...]:
        return row_counts(most, invariant=self.batch_invariant)

    def precompile(self, rows: Sequence[int], ranks: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """In parallel processes, the kernels of the operations that were prepared; all but the first start on a
        machine find them on disk, and begin no process."""
        if self._device.type != "cuda" or not self._operations:
            return
        every = steps(max(ranks, default=0), invariant=self.batch_invariant)
        wanted = every._replace(rows=tuple(n for n in rows if n < DENSE_ROWS or self.batch_invariant))
        shapes = Shapes(
            operations=tuple(sorted(self._operations)),
            attentions=tuple(self._attentions),
            hidden=self._hidden,
            vocabulary=self._vocabulary,
            dtype=str(self._dtype).removeprefix("torch."),
            invariant=self.batch_invariant,
            overlap=can_overlap(self._device),
        )
        major, minor = torch.cuda.get_device_capability(self._device)
        before = compiled_before(shapes, wanted, 10 * major + minor)
        if before.exists():
            return
        processes = max(1, min(len(os.sched_getaffinity(0)), _MOST_PROCESSES))
        try:
            precompile(shapes, wanted, 10 * major + minor, processes=processes, progress=progress)
        except (RuntimeError, OSError) as error:
            # The passes that come next compile one after another what is missing, and tell what cannot be.
            log.warning("%s", error)
            return
        with suppress(OSError):
            before.touch()

    def decoder(self, layers: Sequence[LayerOperations], heads: int, kv_heads: int, dim: int) -> TritonDecoder:
        for layer in layers:
            self._attentions[Heads(heads, kv_heads, dim, layer.shape.sliding_window)] = None
            self._hidden = layer.input_norm.shape[0]
        return TritonDecoder(layers, heads, kv_heads, dim, invariant=self.batch_invariant)

    def bind(self, segments: tuple[Segment, ...]) -> BoundSegments:
        return bind(segments, self._device) if segments else self._unbound

    def reserve_segments(self, count: int, rows: int, max_rank: int, *, extras: bool) -> BoundSegments:
        return TritonSegments.reserve(count, rows, max_rank, self._device, extras=extras)

    def rebind(self, segments: tuple[Segment, ...], into: BoundSegments) -> None:
        assert isinstance(into, TritonSegments)
        bind(segments, self._device, into)

    def linear(self, x: Tensor, parts: Sequence[LinearPart], segments: Sequence[object]) -> tuple[Tensor, ...]:
        return self._fallback.linear(x, parts, segments)  # type: ignore[arg-type]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: PagedBatch, shape: AttentionShape
    ) -> Tensor:
        elementwise.rotate_and_store(q, k, v, None, None, cache, batch.slots)
        return attention(q, k, v, cache, batch, shape, invariant=self.batch_invariant)

    def norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return elementwise.norm(x, residual, weight, epsilon)

    def gate(self, both: Tensor) -> Tensor:
        return elementwise.gate(both)


def _require_cache() -> None:
    """Triton writes what it compiles, and what launches it, to its cache on disk, and runs nothing without."""
    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StartupError(
            f"Triton compiles GPU kernels into {folder}, which cannot be written to ({error.strerror}); name another "
            "folder by TRITON_CACHE_DIR"
        ) from error

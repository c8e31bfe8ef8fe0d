"""Native operations on the CPU, in bfloat16; whatever they do not take goes to the torch + bitsandbytes path."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.ops.backend import BoundSegments, Linear, LinearPart
from loramux.ops.cpu.build import load_native
from loramux.ops.cpu.packed import PackedNF4
from loramux.ops.dense import DenseWeight
from loramux.ops.fused import FusedLinear, FusingBackend, LayerOperations
from loramux.ops.grouped import GroupedBackend
from loramux.ops.layout import strided
from loramux.ops.nf4 import BLOCK_SIZE
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.segment import AdapterWeights, Segment

_NONE = torch.empty(0, dtype=torch.bfloat16)
_NO_SINKS = torch.empty(0, dtype=torch.float32)
# Below this depth a tile of a dense weight would be read past its row.
_DENSE_MULTIPLE = 32


@dataclass(frozen=True, slots=True, eq=False)
class NativeSegments(BoundSegments):
    """`table` is int64 [segments, 6]: start, stop, weight's bits, addresses of buffer, offsets and ranks."""

    table: Tensor


class NativeLinear(FusedLinear):
    """Parts in tile order, and their addresses in one tensor (the words of `Part` in linear.h)."""

    def __init__(
        self,
        words: list[list[int]],
        weights: Sequence[PackedNF4 | DenseWeight],
        biases: Sequence[Tensor | None],
    ) -> None:
        """`words` hold the addresses of the weights and of their float32 biases."""
        self.words = words
        self._plan = torch.tensor(words, dtype=torch.int64)
        self._weights = tuple(weights)
        self._biases = tuple(biases)
        self._bounds = [(row[10], row[10] + row[8]) for row in words]
        self.width = self._bounds[-1][1]
        self.parts = len(words)
        packed = [weight for weight in weights if isinstance(weight, PackedNF4)]
        dense = [weight for weight in weights if isinstance(weight, DenseWeight)]
        self.nbytes, self.numel = sum(w.nbytes for w in packed), sum(w.n * w.k for w in packed)
        self.dense_nbytes, self.dense_numel = sum(w.nbytes for w in dense), sum(w.numel for w in dense)

    def dequantize(self, part: int) -> Tensor:
        weight = self._weights[part]
        return (weight.unpack() if isinstance(weight, PackedNF4) else weight).dequantize(torch.float32)

    def run(self, x: Tensor, segments: BoundSegments) -> Tensor:
        assert isinstance(segments, NativeSegments)
        y = x.new_empty(x.shape[0], self.width)
        torch.ops.loramux_cpu.linear(x, self._plan, segments.table, y)
        return y

    def __call__(self, x: Tensor, segments: BoundSegments) -> tuple[Tensor, ...]:
        y = self.run(x, segments)
        return tuple(y[:, begin:end] for begin, end in self._bounds)


class NativeDecoder:
    """A stack of Llama-shaped layers with `heads` and `kv_heads` of `dim`, run in one call (decoder.cpp)."""

    def __init__(self, layers: Sequence[LayerOperations], heads: int, kv_heads: int, dim: int) -> None:
        """Takes shapes without softcap and sinks."""
        assert all(layer.shape.softcap is None and layer.shape.sinks is None for layer in layers)
        self._layers = tuple(layers)
        self._heads = heads, kv_heads, dim
        self._inner = layers[0].gate_up.width // 2
        self._caches: tuple[LayerCache, ...] = ()
        self._plan = torch.empty(0, dtype=torch.int64)

    def run(
        self,
        x: Tensor,
        cosines: Tensor,
        sines: Tensor,
        caches: Sequence[LayerCache],
        batch: PagedBatch,
        segments: BoundSegments,
    ) -> Tensor:
        assert isinstance(segments, NativeSegments)
        if self._caches != tuple(caches):
            self._caches = tuple(caches)
            words = [_layer_words(*pair) for pair in zip(self._layers, caches, strict=True)]
            self._plan = torch.tensor(words, dtype=torch.int64)
        y = x.clone(memory_format=torch.contiguous_format)
        torch.ops.loramux_cpu.decoder(
            y,
            self._plan,
            segments.table,
            cosines.contiguous(),
            sines.contiguous(),
            batch.slots,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            *self._heads,
            self._inner,
            caches[0].block_size,
        )
        return y


def _layer_words(layer: LayerOperations, cache: LayerCache) -> list[int]:
    """The words of `Part` seven times, then those that module.cpp reads into a `Layer`."""
    parts = []
    for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
        assert isinstance(linear, NativeLinear)
        parts += linear.words
    assert len(parts) == 7
    return [
        *(word for part in parts for word in part),
        layer.input_norm.data_ptr(),
        layer.post_attention_norm.data_ptr(),
        _bits(layer.input_epsilon),
        _bits(layer.post_attention_epsilon),
        cache.keys.data_ptr(),
        cache.values.data_ptr(),
        layer.shape.sliding_window or 0,
        _bits(layer.shape.scaling),
    ]


class NativeBackend(FusingBackend):
    """AMX, AVX512 or AVX2, whichever `load_native` finds best. Raises build.Unavailable.

    `norm`, `gate` and `rotary_attention` are what NativeDecoder's layers are made of, one at a time; all in bfloat16.
    """

    batch_invariant = True
    widest_head: int = 512  # kWidestHead in attention.h; wider ones take the torch path

    def __init__(self, isa: str = "auto", threads: int | None = None) -> None:
        self.isa = load_native(isa, threads)
        self.name = f"native {self.isa}"
        self._fallback = GroupedBackend()
        self._unbound = NativeSegments((), torch.empty(0, 6, dtype=torch.int64))

    def prepare(self, parts: Sequence[LinearPart], sites: Sequence[int]) -> Linear:
        dense = [part.weight for part in parts if isinstance(part.weight, DenseWeight)]
        if any(part.weight.shape[1] % BLOCK_SIZE for part in parts) or any(
            w.values.dtype != torch.bfloat16 for w in dense
        ):
            return super().prepare(parts, sites)
        words: list[list[int]] = []
        weights: list[PackedNF4 | DenseWeight] = []
        biases: list[Tensor | None] = []
        column = 0
        for part, site in zip(parts, sites, strict=True):
            if isinstance(part.weight, DenseWeight):
                words.append(_dense_words(part.weight.values, held := _held(part.bias), site, column))
                weights.append(part.weight)
                biases.append(held)
                column += part.weight.shape[0]
                continue
            packed = PackedNF4.pack(part.weight, vectors=self.isa != "amx")
            bias = _held(part.bias)
            double = packed.table.numel() != 0
            words.append(
                [
                    packed.codes.data_ptr(),
                    0,
                    packed.absmax.data_ptr() if double else 0,
                    0 if double else packed.absmax.data_ptr(),
                    packed.group_scale.data_ptr(),
                    packed.table.data_ptr(),
                    0 if bias is None else bias.data_ptr(),
                    _bits(packed.offset),
                    packed.n,
                    site,
                    column,
                ]
            )
            weights.append(packed)
            biases.append(bias)
            column += packed.n
        return NativeLinear(words, weights, biases)

    def prepare_dense(self, weight: Tensor, bias: Tensor | None) -> NativeLinear | None:
        if weight.dtype != torch.bfloat16 or weight.shape[1] % _DENSE_MULTIPLE or not weight.is_contiguous():
            return None
        held = _held(bias)
        return NativeLinear([_dense_words(weight, held, -1, 0)], [DenseWeight(weight)], [held])

    def decoder(self, layers: Sequence[LayerOperations], heads: int, kv_heads: int, dim: int) -> NativeDecoder:
        return NativeDecoder(layers, heads, kv_heads, dim)

    def bind(self, segments: tuple[Segment, ...]) -> BoundSegments:
        if not segments:
            return self._unbound
        rows = []
        for segment in segments:
            weights = segment.sites
            if not isinstance(weights, AdapterWeights):
                raise TypeError("native kernels read adapters by address; Segment.sites must be AdapterWeights")
            addresses = (weights.buffer.data_ptr(), weights.offsets.data_ptr(), weights.ranks.data_ptr())
            rows.append((segment.start, segment.stop, _bits(segment.weight), *addresses))
        return NativeSegments(segments, torch.tensor(rows, dtype=torch.int64))

    def linear(self, x: Tensor, parts: Sequence[LinearPart], segments: Sequence[object]) -> tuple[Tensor, ...]:
        return self._fallback.linear(x, parts, segments)  # type: ignore[arg-type]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: PagedBatch, shape: AttentionShape
    ) -> Tensor:
        if q.dtype != torch.bfloat16 or max(q.shape[2], v.shape[2]) > self.widest_head:
            return self._fallback.attention(q, k, v, cache, batch, shape)
        return self._attend(_dense_heads(q), _dense_heads(k), _dense_heads(v), _NONE, _NONE, cache, batch, shape)

    def rotary_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cosines: Tensor,
        sines: Tensor,
        cache: LayerCache,
        batch: PagedBatch,
        shape: AttentionShape,
    ) -> Tensor:
        """`Backend.attention` of q and k rotated by cosines and sines [T, D] (halves, as transformers rotates)."""
        return self._attend(q, k, v, cosines, sines, cache, batch, shape)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cosines: Tensor,
        sines: Tensor,
        cache: LayerCache,
        batch: PagedBatch,
        shape: AttentionShape,
    ) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        torch.ops.loramux_cpu.attention(
            q,
            k,
            v,
            cosines.contiguous(),
            sines.contiguous(),
            cache.keys,
            cache.values,
            batch.slots,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            _NO_SINKS if shape.sinks is None else shape.sinks.float(),
            out,
            shape.scaling,
            shape.softcap or 0.0,
            shape.sliding_window or 0,
        )
        return out

    def norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        y = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        torch.ops.loramux_cpu.norm(x, _NONE if residual is None else residual, weight, epsilon, total, y)
        return total, y

    def gate(self, both: Tensor) -> Tensor:
        y = both.new_empty(both.shape[0], both.shape[1] // 2)
        torch.ops.loramux_cpu.gate(both.contiguous(), y)
        return y


def _held(bias: Tensor | None) -> Tensor | None:
    """A bias as the kernels read it; to be kept as long as its address is used."""
    return None if bias is None else bias.float().contiguous()


def _dense_words(weight: Tensor, bias: Tensor | None, site: int, column: int) -> list[int]:
    """The words of a `Part` that is dense."""
    address = 0 if bias is None else bias.data_ptr()
    return [0, weight.data_ptr(), 0, 0, 0, 0, address, 0, weight.shape[0], site, column]


def _dense_heads(t: Tensor) -> Tensor:
    return t if strided(t, 1, t.shape[2]) and strided(t, 2, 1) else t.contiguous()


def _bits(value: float) -> int:
    """A float32's bits, as the kernels read it from an int64 word."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits

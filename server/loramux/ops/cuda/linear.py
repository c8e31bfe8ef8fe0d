"""One linear operation on a GPU: NF4 parts that share an input, and every adapter's branch, in two launches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from loramux.ops.backend import BoundSegments, LinearPart, PlainLinear
from loramux.ops.cuda.kernels import lora_down, nf4_linear
from loramux.ops.cuda.lookup import is_standard, lookup_assembly
from loramux.ops.cuda.segments import DOWN_RANKS, DOWN_ROWS, MAX_PARTS, TritonSegments
from loramux.ops.cuda.tiles import TiledNF4
from loramux.ops.fused import FusedLinear
from loramux.ops.grouped import GroupedBackend
from loramux.ops.layout import strided
from loramux.ops.nf4 import BLOCK_SIZE, NF4Weight

DTYPES = (torch.bfloat16, torch.float16)
# A program sums at least so many blocks of 64 inputs; below that its start costs more than its share.
_LEAST_BLOCKS = 8
_MAX_SPLITS = 16
_FEWEST_OUTPUTS = 64  # of all tiles below
# From so many rows on (long prefill chunks) a weight is dequantized once, for a dense product of the library's: each of
# the kernel's tiles of 128 rows would expand it again. An estimate; nothing was measured.
DENSE_ROWS = 512
# Inputs of a share of K in lora_down: few where there are few segments to fill the device with.
_DOWN_INPUTS = 512
_DOWN_INPUTS_OF_MANY = 1024
_MAX_DOWN_SPLITS = 32
MANY_SEGMENTS = 16
_interpreted = not isinstance(nf4_linear, triton.JITFunction)


class Operation(NamedTuple):
    """A shape: inputs, the outputs of each part, whether absmax is quantized, and whether there are biases."""

    inputs: int
    outputs: tuple[int, ...]
    double: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Tiling:
    """How an operation is cut into programs.

    outputs   of a program's tile
    rows      of it
    warps     of a program. Two multiply by mma.sync, whose operand is made of codes in registers; four do with wgmma
              from sixteen rows on, which costs them an exchange of the codes
    stages    turns whose loads are in flight
    blocks    of 64 inputs, a turn
    programs  below which K is split: some for each of an H100's 132 multiprocessors. Not asked of the device at hand,
              so that a model's sums have one order everywhere
    """

    outputs: int
    rows: int
    warps: int
    stages: int
    blocks: int
    programs: int


def tiling(rows: int, *, invariant: bool) -> Tiling:
    """The tiles for a batch of so many rows; with `invariant` the same for every batch.

    The quickest of those that were measured on an H200 at the shapes of Llama-3-8B (docs/gpu.md).
    """
    if invariant:
        return Tiling(64, 64, 4, 4, 1, 528)
    if rows <= 8:
        return Tiling(128, 8, 4, 3, 2, 1056)
    if rows <= 16:
        return Tiling(64, 16, 2, 4, 2, 1056)
    if rows <= 32:
        return Tiling(64, 32, 2, 4, 1, 1056)
    if rows <= 64:
        return Tiling(64, 64, 4, 4, 1, 528)
    return Tiling(64, 128, 4, 3, 1, 132)


def row_counts(most: int, *, invariant: bool) -> tuple[int, ...]:
    """Numbers of rows up to `most`, such that any other one launches the kernels of one of these: the last of each
    tiling, and of each number of tiles of 128 rows, which decides into how many shares K is cut."""
    if invariant:
        return (most,)
    last = (8, 16, 32, 64, *range(128, DENSE_ROWS, 128), DENSE_ROWS - 1)
    return (*(rows for rows in last if rows < most), most)


@dataclass(frozen=True, slots=True)
class DownTiling:
    """Ranks, rows and inputs of a tile of lora_down's, and the loads it keeps in flight; four warps."""

    ranks: int
    rows: int
    inputs: int
    stages: int


def down_tiling(rows: int, max_rank: int, k: int, *, invariant: bool) -> DownTiling:
    """The tiles of h for a batch of so many rows and ranks up to `max_rank`; with `invariant` the same for every batch.

    A tile of 64 ranks may be multiplied by another instruction than one of 16, which may add in another order: a row's
    bits must not follow the largest rank of its company.
    """
    ranks = DOWN_RANKS if invariant else min(DOWN_RANKS, triton.next_power_of_2(max_rank))
    tile = min(tiling(rows, invariant=invariant).rows, DOWN_ROWS)
    # Three of a large tile's loads are as much as an SM of 8.6 has.
    return DownTiling(ranks, tile, 128 if k % 128 == 0 else 64, 3 if ranks + tile > 96 else 4)


class TritonLinear(FusedLinear):
    """NF4 parts in tile order (tiles.py) and float32 biases, on the device; runs in bfloat16 or float16.

    Each row is W·x in float32, its branches and biases added in float32, rounded once; h = weight·(A·x) is rounded to
    x's dtype on the way. From DENSE_ROWS rows on, GroupedBackend's way, with the same weight. With `invariant` a row's
    bits do not depend on the other rows: one tile shape, and one order of summation, whatever the batch.

    It takes parts for which `accepts` is true. What it does not take is left to GroupedBackend (through PlainLinear): a
    dense weight, K that is no multiple of 64, parts of one operation of which only some are doubly quantized, a table
    that is not NF4's, and float32.
    """

    def __init__(
        self,
        tiled: TiledNF4,
        biases: Sequence[Tensor | None],
        sites: Sequence[int],
        *,
        overlap: bool,
        invariant: bool = False,
    ) -> None:
        """`biases` and `sites` (indices into an adapter's offsets and ranks): one for each part of `tiled`. `overlap`:
        W·x begins while A·x is computed, on a device that `can_overlap`."""
        self._tiled = tiled
        self._overlap = overlap
        self._invariant = invariant
        device = tiled.codes.device
        self._sites = torch.tensor(list(sites), dtype=torch.int64, device=device)
        self._site_indices = tuple(sites)
        self._biases = tuple(biases)
        self._bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            zeros = tiled.values.new_zeros
            self._bias = torch.cat(
                [
                    zeros(rows) if bias is None else bias.to(device, torch.float32)
                    for rows, bias in zip(tiled.rows, biases, strict=True)
                ]
            )
        # The program that arrives last sets its counter back to zero. For one tile of rows: decode steps, their graphs.
        self._arrivals = torch.zeros(self._places(_FEWEST_OUTPUTS), dtype=torch.int32, device=device)
        ends = list(itertools.accumulate(self._tiled.rows))
        self._bounds = list(zip([0, *ends], ends, strict=False))
        self.width = ends[-1]
        self.parts = len(tiled.rows)
        self.nbytes, self.numel = self._tiled.nbytes, self._tiled.numel
        self.dense_nbytes = self.dense_numel = 0

    @classmethod
    def pack(cls, parts: Sequence[LinearPart], sites: Sequence[int], *, invariant: bool = False) -> TritonLinear:
        """The operation of parts that `accepts` takes, on their device."""
        weights = _nf4(parts)
        assert weights is not None
        tiled, biases = TiledNF4.pack(weights), [part.bias for part in parts]
        return cls(tiled, biases, sites, overlap=can_overlap(tiled.codes.device), invariant=invariant)

    @staticmethod
    def accepts(parts: Sequence[LinearPart]) -> bool:
        """Whether the kernels can run these parts as one operation."""
        weights = _nf4(parts)
        return (
            weights is not None
            and len(parts) <= MAX_PARTS
            and TiledNF4.accepts(weights)
            and is_standard(weights[0].table)
        )

    @property
    def operation(self) -> Operation:
        """What its kernels are compiled for."""
        return Operation(self._tiled.k, self._tiled.rows, self._tiled.double, self._bias is not None)

    def dequantize(self, part: int) -> Tensor:
        return self._tiled.unpack(part).dequantize(torch.float32)

    def __call__(self, x: Tensor, segments: BoundSegments) -> tuple[Tensor, ...]:
        y = self.run(x, segments)
        return tuple(y[:, begin:end] for begin, end in self._bounds)

    def run(self, x: Tensor, segments: BoundSegments) -> Tensor:
        """x [T, K], bfloat16 or float16, rows contiguous → [T, ΣN] in x's dtype, the parts side by side."""
        assert isinstance(segments, TritonSegments)
        assert x.dtype in DTYPES
        assert x.shape[1] == self._tiled.k
        assert strided(x, 1, 1)
        if x.shape[0] >= DENSE_ROWS and not self._invariant:
            parts = [LinearPart(self._tiled.unpack(p), bias) for p, bias in enumerate(self._biases)]
            return torch.cat(PlainLinear(GroupedBackend(), parts, self._site_indices)(x, segments), dim=1)
        y = x.new_empty(x.shape[0], self.width)
        if x.shape[0]:
            self._launch(x, y, segments)
        return y

    def _launch(self, x: Tensor, y: Tensor, segments: TritonSegments) -> None:
        tiled, rows = self._tiled, x.shape[0]
        shape = tiling(rows, invariant=self._invariant)
        assert shape.outputs >= _FEWEST_OUTPUTS
        row_tiles, places = -(-rows // shape.rows), self._places(shape.outputs)
        splits = self._splits(places * (1 if self._invariant else row_tiles), shape.programs)
        lora = segments.capacity > 0 and segments.max_rank > 0
        arrivals = self._arrivals
        if splits > 1 and row_tiles > 1:
            # Before lora_down: whatever is launched between the two would keep them from running side by side.
            arrivals = torch.zeros(places * row_tiles, dtype=torch.int32, device=x.device)
        items, h = self._sites, tiled.offsets
        if lora:
            items, h = self._down(x, segments)
        partial = tiled.offsets
        if splits > 1:
            partial = torch.empty(
                places * row_tiles * splits * shape.outputs * shape.rows, dtype=torch.float32, device=x.device
            )
        nf4_linear[(places * splits * row_tiles,)](
            x,
            y,
            tiled.codes,
            tiled.absmax,
            tiled.group_scales,
            tiled.tables,
            tiled.offsets,
            tiled.values,
            tiled.offsets if self._bias is None else self._bias,
            partial,
            arrivals,
            segments.table,
            self._sites,
            items,
            h,
            rows,
            x.stride(0),
            segments.max_rank,
            segments.capacity,
            K=tiled.k,
            PARTS=self.parts,
            ROWS=tiled.rows,
            COLUMNS=self.width,
            DOUBLE=tiled.double,
            BIAS=self._bias is not None,
            LORA=lora,
            EXTRAS=lora and segments.extras,
            SHARED=not self._invariant,
            SPLITS=splits,
            UNROLL=shape.blocks if _whole_turns(tiled.k // BLOCK_SIZE, splits, shape.blocks) else 1,
            BLOCK_N=shape.outputs,
            BLOCK_T=shape.rows,
            ASSEMBLY=_assembly(x.dtype),
            WAIT=lora and self._overlap,
            WIDE=_interpreted,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **({"launch_pdl": True} if lora and self._overlap else {}),
        )

    def _down(self, x: Tensor, segments: TritonSegments) -> tuple[Tensor, Tensor]:
        """The items that say where B is, and h; see `lora_down`."""
        k, rows, ranks = self._tiled.k, segments.rows, segments.max_rank
        splits = self._down_splits(segments.capacity)
        shape = down_tiling(x.shape[0], ranks, k, invariant=self._invariant)
        h = x.new_empty(rows, self.parts, ranks)
        shares = x.new_empty(splits, *h.shape, dtype=torch.float32) if splits > 1 else h
        items = torch.empty(self.parts, segments.capacity, 2, dtype=torch.int64, device=x.device)
        # No segment has more rows than all of them.
        tiles = -(-ranks // shape.ranks) * -(-min(x.shape[0], rows) // shape.rows)
        lora_down[(tiles, segments.capacity * splits, self.parts)](
            x,
            segments.table,
            self._sites,
            h,
            shares,
            segments.arrivals,
            items,
            x.stride(0),
            rows,
            ranks,
            segments.capacity,
            K=k,
            PARTS=self.parts,
            SPLITS=splits,
            BLOCK_R=shape.ranks,
            BLOCK_T=shape.rows,
            BLOCK_K=shape.inputs,
            OVERLAP=self._overlap,
            WIDE=_interpreted,
            num_warps=4,
            num_stages=shape.stages,
        )
        return items, h

    def _down_splits(self, segments: int) -> int:
        """Shares of K in lora_down; always the same if a row's bits must be."""
        few = segments < MANY_SEGMENTS or self._invariant
        return min(-(-self._tiled.k // (_DOWN_INPUTS if few else _DOWN_INPUTS_OF_MANY)), _MAX_DOWN_SPLITS)

    def _places(self, outputs: int) -> int:
        """Tiles of outputs."""
        return sum(-(-rows // outputs) for rows in self._tiled.rows)

    def _splits(self, programs: int, enough: int) -> int:
        """Shares of K, so that there are enough programs; a power of two, and each share has blocks."""
        blocks, splits = self._tiled.k // BLOCK_SIZE, 1
        while programs * splits < enough and splits < _MAX_SPLITS and blocks // (2 * splits) >= _LEAST_BLOCKS:
            splits *= 2
        return splits


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can begin while the one before it runs, and wait for it (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _whole_turns(blocks: int, splits: int, turn: int) -> bool:
    """Whether all shares of a number of blocks are whole turns."""
    return blocks % turn == 0 and -(-blocks // splits) % turn == 0


def _nf4(parts: Sequence[LinearPart]) -> list[NF4Weight] | None:
    """The weights, if they are all NF4."""
    weights = [part.weight for part in parts if isinstance(part.weight, NF4Weight)]
    return weights if len(weights) == len(parts) else None


def _assembly(dtype: torch.dtype) -> str:
    return "" if _interpreted else _ASSEMBLIES[dtype]


_ASSEMBLIES = {dtype: lookup_assembly(dtype) for dtype in DTYPES}

"""The segments of a step where kernels find them: one table of addresses on the device."""

from __future__ import annotations

import struct
from collections.abc import MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loramux.ops.backend import BoundSegments
from loramux.ops.segment import AdapterWeights, Segment

COLUMNS = 8
# Ranks are read in such steps, so that what lies between the steps of two adapters is never read.
RANK_MULTIPLE = 16
# What a table's counters are for: the most parts of an operation, and the largest tile of ranks and rows of h = A·x.
MAX_PARTS = 4
DOWN_RANKS = 64
DOWN_ROWS = 64

# An adapter's offsets and ranks on the device, as long as the adapter lives; keyed by its offsets on the CPU.
_placed: MutableMapping[Tensor, tuple[Tensor, Tensor]] = WeakTensorKeyDictionary()
# Whether an adapter's ranks are multiples of eight; keyed by its ranks.
_multiples: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class TritonSegments(BoundSegments):
    """What the kernels read of a step's segments, and the bounds that the launches are sized by.

    table     int64 [capacity + 1, 8] on the device. Row 0 begins with the number of segments, and whether all their
              ranks are multiples of eight; each of the rows after it holds start, stop, the weight's float32 bits, the
              addresses of buffer, offsets and ranks, and the first of the segment's rows in the intermediate products.
              Rows beyond the number are zero.
    arrivals  int32, zero between launches: how many of the programs that share a tile of h have arrived
    rows      at least the sum of the segments' lengths
    max_rank  at least the largest rank of any site, a multiple of 16
    extras    whether a segment may have lora_bias or a scale
    """

    table: Tensor
    arrivals: Tensor
    rows: int
    max_rank: int
    extras: bool

    @property
    def capacity(self) -> int:
        """Segments that the table has room for."""
        return self.table.shape[0] - 1

    @classmethod
    def reserve(cls, capacity: int, rows: int, max_rank: int, device: torch.device, *, extras: bool) -> TritonSegments:
        """An empty table, to be written again and again by `bind(..., into=...)`: for CUDA graphs."""
        table = torch.zeros(capacity + 1, COLUMNS, dtype=torch.int64, device=device)
        max_rank = _round_up(max_rank)
        # Tiles of fewer ranks are only made where all fit into one, and of fewer rows likewise.
        tiles = -(-max_rank // DOWN_RANKS) * -(-rows // DOWN_ROWS)
        arrivals = torch.zeros(MAX_PARTS * capacity * tiles, dtype=torch.int32, device=device)
        return cls((), table, arrivals, rows, max_rank, extras)


def bind(segments: tuple[Segment, ...], device: torch.device, into: TritonSegments | None = None) -> TritonSegments:
    """Write the table of `segments`, all of them AdapterWeights on `device`; empty segments are left out.

    With `into`, into its tensors, whose addresses stay, in the order of the current stream. Raises ValueError if its
    bounds are too small for these segments.
    """
    rows: list[tuple[int, ...]] = []
    total, max_rank, extras, aligned = 0, 0, False, True
    for segment in segments:
        weights = segment.sites
        if not isinstance(weights, AdapterWeights):
            raise TypeError("Triton kernels read adapters by address; Segment.sites must be AdapterWeights")
        if segment.start >= segment.stop:
            continue
        offsets, ranks = _on_device(weights, device)
        addresses = weights.buffer.data_ptr(), offsets.data_ptr(), ranks.data_ptr()
        rows.append((segment.start, segment.stop, _bits(segment.weight), *addresses, total, 0))
        total += segment.stop - segment.start
        max_rank = max(max_rank, weights.max_rank)
        extras |= weights.extras
        aligned &= _aligned(weights)
    bound = into
    if bound is None:
        bound = TritonSegments.reserve(len(rows), total, max_rank, device, extras=extras)
    elif len(rows) > bound.capacity or total > bound.rows or max_rank > bound.max_rank or extras > bound.extras:
        raise ValueError(
            f"{len(rows)} segments of {total} rows, ranks to {max_rank} (lora_bias or DoRA: {extras}) do not fit a "
            f"table for {bound.capacity} of {bound.rows} rows, ranks to {bound.max_rank} ({bound.extras})"
        )
    if rows or into is not None:
        host = torch.zeros(bound.table.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        host[0, 0], host[0, 1] = len(rows), aligned
        if rows:
            host[1 : len(rows) + 1] = torch.tensor(rows, dtype=torch.int64)
        bound.table.copy_(host, non_blocking=True)
    return replace(bound, segments=segments)


def _aligned(weights: AdapterWeights) -> bool:
    """Whether rows of all its B begin at multiples of sixteen bytes."""
    known = _multiples.get(weights.ranks)
    if known is None:
        known = _multiples[weights.ranks] = not bool((weights.ranks % 8).any())
    return known


def _on_device(weights: AdapterWeights, device: torch.device) -> tuple[Tensor, Tensor]:
    """The adapter's offsets and ranks where kernels can read them."""
    if device.type == "cpu":
        return weights.offsets, weights.ranks
    placed = _placed.get(weights.offsets)
    if placed is None:
        placed = _placed[weights.offsets] = weights.offsets.to(device), weights.ranks.to(device)
    return placed


def _round_up(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def _bits(value: float) -> int:
    """A float32's bits, as the kernels read it from an int64 word."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits

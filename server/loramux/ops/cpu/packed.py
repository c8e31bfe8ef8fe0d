"""NF4 in the order in which the native kernels read it: the same bits, by tiles. Both layouts stand in linear.h."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.ops.nf4 import BLOCK_SIZE, NF4Weight

TILE = 16
# The kernel reads the scales of sixteen groups at a time.
_SLACK = 16


@dataclass(frozen=True, slots=True, eq=False)
class PackedNF4:
    """An NF4 weight [n, k] in tile order; rows are padded to a multiple of 16.

    codes        uint8 [tiles, k/64, 16, 32]: by rows for AMX tiles, by inputs for vectors
    absmax       uint8 (float32 without double quantization) [tiles, k/64, 16]
    group_scale  float32 [groups + 16], empty without double quantization
    table        float32 [256], shared by all weights; empty without double quantization
    values       float32 [16], NF4's own table, shared by all weights
    """

    n: int
    k: int
    codes: Tensor
    absmax: Tensor
    group_scale: Tensor
    table: Tensor
    values: Tensor
    offset: float
    vectors: bool

    @classmethod
    def pack(cls, weight: NF4Weight, *, vectors: bool) -> PackedNF4:
        """Reorder `weight` for the kernel that works on vectors, or the one on tiles; k must be a multiple of 64."""
        n, k = weight.shape
        assert k % BLOCK_SIZE == 0
        tiles, blocks = -(-n // TILE), k // BLOCK_SIZE
        pairs = weight.codes.view(n, k // 2)
        codes = torch.zeros(tiles * TILE, k, dtype=torch.uint8)
        codes[:n] = torch.stack((pairs >> 4, pairs & 15), dim=-1).view(n, k)
        absmax = torch.zeros(tiles * TILE, blocks, dtype=weight.absmax.dtype)
        absmax[:n] = weight.absmax.view(n, blocks)
        double = weight.nested_absmax is not None
        return cls(
            n=n,
            k=k,
            codes=(_by_inputs if vectors else _by_rows)(codes.view(tiles, TILE, blocks, BLOCK_SIZE)),
            absmax=absmax.view(tiles, TILE, blocks).permute(0, 2, 1).contiguous(),
            group_scale=_padded(weight.nested_absmax) if weight.nested_absmax is not None else torch.empty(0),
            table=_shared_table(weight.nested_table) if weight.nested_table is not None else torch.empty(0),
            values=_shared_table(weight.table),
            offset=float(weight.offset) if double and weight.offset is not None else 0.0,
            vectors=vectors,
        )

    def unpack(self) -> NF4Weight:
        """The weight that was packed, to the bit; in memory of its own but for the tables."""
        codes = (_of_inputs if self.vectors else _of_rows)(self.codes).reshape(-1, self.k)[: self.n].reshape(-1, 2)
        absmax = self.absmax.permute(0, 2, 1).reshape(-1, self.k // BLOCK_SIZE)[: self.n].flatten()
        double = self.table.numel() != 0
        return NF4Weight(
            shape=(self.n, self.k),
            codes=(codes[:, 0] << 4) | codes[:, 1],
            absmax=absmax,
            table=self.values,
            nested_absmax=self.group_scale[:-_SLACK] if double else None,
            nested_table=self.table if double else None,
            offset=torch.tensor(self.offset) if double else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the weight."""
        return self.codes.numel() + self.absmax.numel() * self.absmax.element_size() + self.group_scale.numel() * 4


def _by_rows(codes: Tensor) -> Tensor:
    """[tiles, 16, blocks, 64] → [tiles, blocks, 16, 32]: input j of a row in the high nibble, 32 + j in the low one."""
    halves = codes.unflatten(3, (2, BLOCK_SIZE // 2)).transpose(1, 2)
    packed: Tensor = ((halves[..., 0, :] << 4) | halves[..., 1, :]).contiguous()
    return packed


def _of_rows(packed: Tensor) -> Tensor:
    """Inverse of `_by_rows`."""
    codes: Tensor = torch.stack((packed >> 4, packed & 15), dim=3).flatten(3).transpose(1, 2)
    return codes


def _by_inputs(codes: Tensor) -> Tensor:
    """[tiles, 16, blocks, 64] → [tiles, blocks, 16, 32], four inputs in each 32 bytes.

    Row 8·b + 4·a + c and input 4·q + 2·d + e stand in byte [q, a, b, c, e], for d = 0 in the low nibble.
    """
    split = codes.view(codes.shape[0], 2, 2, 4, codes.shape[2], TILE, 2, 2)
    low, high = split.permute(6, 0, 4, 5, 2, 1, 3, 7)  # d; tile, block, q, a, b, c, e
    packed: Tensor = (low | (high << 4)).flatten(3).contiguous()
    return packed


def _of_inputs(packed: Tensor) -> Tensor:
    """Inverse of `_by_inputs`."""
    split = torch.stack((packed & 15, packed >> 4)).unflatten(4, (2, 2, 4, 2))  # d, tile, block, q, a, b, c, e
    codes: Tensor = split.permute(1, 5, 4, 6, 2, 3, 0, 7).reshape(packed.shape[0], TILE, packed.shape[1], BLOCK_SIZE)
    return codes


def _padded(scales: Tensor) -> Tensor:
    return torch.cat((scales, scales.new_zeros(_SLACK)))


_tables: dict[bytes, Tensor] = {}


def _shared_table(table: Tensor) -> Tensor:
    """One copy of each distinct table: bitsandbytes gives every weight its own, and the kernel looks into it all the
    time."""
    return _tables.setdefault(table.numpy().tobytes(), table.contiguous())

"""NF4 in the order in which the Triton kernels stream it: the same bits, by tiles of 64 outputs and 64 inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.ops.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Weight

TILE = 64


@dataclass(frozen=True, slots=True, eq=False)
class TiledNF4:
    """NF4 weights [N_p, K] of several parts, each padded to whole tiles, one after the other.

    A program reads the codes of a tile as 2 KiB in a row, sixteen bytes a thread, and those of all its tiles as one
    stream. Byte j of a row of a tile holds input j of the block in its high nibble and input 32 + j in its low one, so
    that both halves meet inputs that are adjacent.

    rows          N_p of each part
    codes         uint8 [tiles, K/64, 64, 32]
    absmax        uint8 [tiles, K/64, 64] with double quantization, else float32
    group_scales  float32 [groups], the nested absmax of the parts one after the other; empty without
    tables        float32 [parts, 256], bitsandbytes' 8-bit maps; empty without double quantization
    offsets       float32 [parts]
    values        float32 [16], NF4's own table
    """

    k: int
    rows: tuple[int, ...]
    codes: Tensor
    absmax: Tensor
    group_scales: Tensor
    tables: Tensor
    offsets: Tensor
    values: Tensor

    @property
    def double(self) -> bool:
        """Whether absmax is quantized too."""
        return self.absmax.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the weights."""
        own = (self.codes, self.absmax, self.group_scales, self.offsets)
        return sum(t.numel() * t.element_size() for t in own)

    @property
    def numel(self) -> int:
        """Weights represented."""
        return sum(self.rows) * self.k

    @staticmethod
    def accepts(weights: Sequence[NF4Weight]) -> bool:
        """Whether blocks end where rows end, and the weights differ in nothing but numbers."""
        first = weights[0]
        return first.shape[1] % BLOCK_SIZE == 0 and all(
            weight.shape[1] == first.shape[1]
            and weight.absmax.dtype == first.absmax.dtype
            and (weight.nested_absmax is None) == (first.absmax.dtype == torch.float32)
            and torch.equal(weight.table, first.table)
            for weight in weights
        )

    @classmethod
    def pack(cls, weights: Sequence[NF4Weight]) -> TiledNF4:
        """Reorder weights that `accepts` takes; on their device."""
        k = weights[0].shape[1]
        nothing = weights[0].table.new_empty(0)
        scales = [w.nested_absmax for w in weights if w.nested_absmax is not None]
        tables = [w.nested_table for w in weights if w.nested_table is not None]
        offsets = [w.offset for w in weights if w.offset is not None]
        return cls(
            k=k,
            rows=tuple(weight.shape[0] for weight in weights),
            codes=torch.cat([_tile_codes(weight) for weight in weights]),
            absmax=torch.cat([_tile_rows(weight.absmax.view(weight.shape[0], -1, 1)).squeeze(3) for weight in weights]),
            group_scales=torch.cat(scales) if scales else nothing,
            tables=torch.stack(tables) if tables else nothing,
            offsets=torch.stack([offset.reshape(()) for offset in offsets]) if offsets else nothing,
            values=weights[0].table,
        )

    def unpack(self, part: int) -> NF4Weight:
        """One of the weights that were packed, to the bit; in memory of its own but for the small tables."""
        n, blocks = self.rows[part], self.k // BLOCK_SIZE
        tiles = [-(-rows // TILE) for rows in self.rows]
        groups = [-(-rows * blocks // NESTED_BLOCK_SIZE) for rows in self.rows]
        tile, group = sum(tiles[:part]), sum(groups[:part])
        pairs = _untile_rows(self.codes[tile : tile + tiles[part]])[:n]
        codes = torch.cat((pairs >> 4, pairs & 15), dim=2).view(-1, 2)
        absmax = _untile_rows(self.absmax[tile : tile + tiles[part]].unsqueeze(3))[:n]
        return NF4Weight(
            shape=(n, self.k),
            codes=(codes[:, 0] << 4) | codes[:, 1],
            absmax=absmax.reshape(-1),
            table=self.values,
            nested_absmax=self.group_scales[group : group + groups[part]] if self.double else None,
            nested_table=self.tables[part] if self.double else None,
            offset=self.offsets[part] if self.double else None,
        )


def _tile_codes(weight: NF4Weight) -> Tensor:
    n, k = weight.shape
    pairs = weight.codes.view(n, k // 2)
    halves = torch.stack((pairs >> 4, pairs & 15), dim=2).view(n, k // BLOCK_SIZE, 2, BLOCK_SIZE // 2)
    return _tile_rows((halves[:, :, 0] << 4) | halves[:, :, 1])


def _tile_rows(values: Tensor) -> Tensor:
    """[N, blocks, w] → [tiles, blocks, 64, w]; rows beyond N are zero."""
    n, blocks, width = values.shape
    padded = values.new_zeros(-(-n // TILE) * TILE, blocks, width)
    padded[:n] = values
    return padded.view(-1, TILE, blocks, width).transpose(1, 2).contiguous()


def _untile_rows(values: Tensor) -> Tensor:
    """[tiles, blocks, 64, w] → [tiles·64, blocks, w]."""
    return values.transpose(1, 2).flatten(0, 1)

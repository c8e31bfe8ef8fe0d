"""Paged keys and values: the cache of one layer, and the part of a batch that attention looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """Keys and values of one layer: [num_blocks, kv_heads, block_size, head_dim] each, in the compute dtype.

    A block's positions follow each other by head, since that is how attention reads them.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LayerCache:
        """Zeroed, so that a row that was never written reads as finite numbers; and by hand, so that the memory is
        taken now and not when traffic first comes along (torch.zeros gets pages that exist only once touched)."""
        shape = (num_blocks, kv_heads, block_size)
        return cls(
            torch.empty(*shape, key_dim, dtype=dtype, device=device).zero_(),
            torch.empty(*shape, value_dim, dtype=dtype, device=device).zero_(),
        )

    @property
    def block_size(self) -> int:
        """Positions of a block."""
        return self.keys.shape[2]

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k [T, kv_heads, key_dim] and v [T, kv_heads, value_dim] at `slots` int64 [T]."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        self.keys[blocks, :, offsets] = k
        self.values[blocks, :, offsets] = v

    def read(self, table: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """The first `context` positions of a sequence with this block table: [context, kv_heads, dim] each."""
        blocks = table[: -(-context // self.block_size)]
        keys, values = (t.index_select(0, blocks).transpose(1, 2) for t in (self.keys, self.values))
        return keys.flatten(0, 1)[:context], values.flatten(0, 1)[:context]


@dataclass(frozen=True, slots=True, eq=False)
class PagedBatch:
    """Where the T rows of a flat batch stand in S sequences. See `model.inputs.ModelInputs` for the tensors.

    `starts` and `contexts` repeat query_starts and context_lens as Python integers for code that loops.
    """

    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    starts: tuple[int, ...]
    contexts: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionShape:
    """What a layer's attention computes besides softmax(q·kᵀ·scaling)·v.

    scaling         multiplies q·kᵀ
    sliding_window  a query at position p sees keys p-window+1 … p; None: all
    softcap         scores become cap·tanh(score/cap) (Gemma 2); None: unchanged
    sinks           [heads] extra logits in the softmax's denominator (gpt-oss); None: none
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

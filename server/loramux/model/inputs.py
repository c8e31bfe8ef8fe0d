"""What the engine hands to the model for one step: a flat batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loramux.ops.segment import Segment


@dataclass(frozen=True, slots=True, eq=False)
class ModelInputs:
    """T rows (tokens) of S sequences, laid out one after another; no padding anywhere.

    token_ids     int64 [T]
    positions     int64 [T]    each token's place in its own sequence
    slots         int64 [T]    where its key and value go: block id * block size + offset
    query_starts  int32 [S+1]  sequence s has rows query_starts[s] … query_starts[s+1]-1
    context_lens  int32 [S]    keys that sequence s has after this step: cached ones plus its own rows
    block_tables  int32 [S, B] sequence s's KV blocks in order; entries past its last block are never read
    logits_rows   int64 [R]    the rows whose logits are wanted
    segments      adapters, by rows; sorted by start

    All tensors are on the CPU when the engine makes them; the model moves them to its device.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logits_rows: Tensor
    segments: tuple[Segment, ...] = ()

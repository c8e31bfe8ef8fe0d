"""Scheduled rows → one flat batch for the model. Knows the layout of ModelInputs and nothing of policy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from loramux.engine.group import Group
from loramux.engine.scheduler import Row
from loramux.engine.sequence import Sequence
from loramux.model.inputs import ModelInputs
from loramux.ops.segment import Segment


@dataclass(frozen=True, slots=True)
class Batch:
    """`rows` as they are laid out in `inputs`; the model's logits row r is for the sequence `sampled[r]`."""

    rows: list[Row]
    sampled: list[Sequence]
    inputs: ModelInputs


def build_batch(rows: list[Row], block_size: int) -> Batch:
    """Lay the rows out one after another, those of one adapter (or one mix) side by side, the base first."""
    rows = sorted(rows, key=lambda row: row.sequence.group.uses_key)  # stable: keeps the order of service
    starts = np.array([row.start for row in rows], dtype=np.int64)
    lengths = np.array([row.stop for row in rows], dtype=np.int64) - starts
    query_starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=query_starts[1:])
    row_of_token = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(query_starts[-1]) - (query_starts[:-1] - starts)[row_of_token]
    tables = _block_tables(rows)
    slots = tables[row_of_token, positions // block_size].astype(np.int64) * block_size + positions % block_size
    wanted = np.array([row.wants_logits for row in rows])
    inputs = ModelInputs(
        token_ids=torch.from_numpy(_token_ids(rows)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_starts=torch.from_numpy(query_starts.astype(np.int32)),
        context_lens=torch.from_numpy((starts + lengths).astype(np.int32)),
        block_tables=torch.from_numpy(tables),
        logits_rows=torch.from_numpy(query_starts[1:][wanted] - 1),
        segments=_segments(rows, query_starts.tolist()),
    )
    return Batch(rows, [row.sequence for row in rows if row.wants_logits], inputs)


def _token_ids(rows: list[Row]) -> np.ndarray:
    # A slice of an array.array is a copy, so the sequences may grow while the batch is in flight.
    return np.concatenate([np.frombuffer(row.sequence.tokens[row.start : row.stop], dtype=np.int64) for row in rows])


def _block_tables(rows: list[Row]) -> np.ndarray:
    tables = np.zeros((len(rows), max(len(row.sequence.blocks) for row in rows)), dtype=np.int32)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.sequence.blocks)] = row.sequence.blocks
    return tables


def _segments(rows: list[Row], query_starts: list[int]) -> tuple[Segment, ...]:
    """One segment for each adapter of each run of rows with equal uses; a mix gives several for a run."""
    segments: list[Segment] = []
    runs = groupby(range(len(rows)), key=lambda i: rows[i].sequence.group.uses_key)
    for _, run in runs:
        members = list(run)
        group: Group = rows[members[0]].sequence.group
        for use in group.uses:
            assert use.handle.weights is not None, "scheduled before its adapter was loaded"
            start, stop = query_starts[members[0]], query_starts[members[-1] + 1]
            segments.append(Segment(start, stop, use.weight, use.handle.weights))
    return tuple(segments)

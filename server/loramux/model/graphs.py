"""Decode steps as recorded launches, replayed: a ladder of CUDA graphs over inputs at addresses that stay.

A decode step of an 8B model is some hundreds of launches of a few microseconds each; without graphs the host takes
longer to make them than the device to run them. A graph fixes addresses and grids, so here
- the inputs live in tensors that are written in place before each replay (`StaticInputs`);
- a step of R sequences runs in the graph of the next size on the ladder; rows beyond R are padding (no slot, no
  context);
- adapters are found through a table of addresses that is rewritten in place: no graph knows any adapter, so none is
  invalid after a swap.

Only decode steps (one row a sequence) up to the end of the ladder are replayed; everything else runs eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loramux.model.inputs import ModelInputs
from loramux.model.shortcut import Shortcut
from loramux.model.step import Step
from loramux.ops.backend import BoundSegments
from loramux.ops.fused import CapturableBackend
from loramux.ops.paged import PagedBatch
from loramux.ops.segment import AdapterWeights, Segment

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Few steps, for each is a graph of its own; their cost is that of programs which find nothing to do.
SEGMENTS = (1, 4, 16, 64, 256)
RANKS = (16, 64, 256)
MIXES = (1, 2, 8)  # adapters a row, on the average
CONTEXTS = (1024, 4096, 16384, 65536, 262144)
# What all graphs together may take of the device (launch descriptions, and the tensors between the launches).
MEMORY = 512 << 20


@dataclass(frozen=True, slots=True)
class Rung:
    """What a graph was recorded for; a step fits if it needs no more of anything.

    rows     sequences, one row each
    context  tokens of the longest
    adapters None: the base alone
    """

    rows: int
    context: int
    adapters: Room | None


@dataclass(frozen=True, slots=True)
class Room:
    """The bounds of a static table of segments: see `CapturableBackend.reserve_segments`."""

    segments: int
    covered: int
    rank: int
    extras: bool


class Recorder(Protocol):
    """Records the launches of a function without running them, and says what they took."""

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """What runs the same launches on the same addresses again. Raises RuntimeError (OutOfMemoryError is one)."""
        ...

    def free_bytes(self) -> int:
        """The device's free memory."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they never run side by side, and none leaves anything in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: meanwhile, other threads may allocate and copy (an adapter that is being loaded).
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        replay: Callable[[], None] = graph.replay
        return replay

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])


class StaticInputs:
    """The inputs of one decode step of at most `rows` sequences, at addresses that stay; one copy writes them all."""

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        """`blocks`: the most KV blocks of one sequence."""
        self._rows = rows
        # One buffer of 32-bit words: token ids, positions and slots (64 bits each), context lengths, block tables.
        self._host = torch.zeros(rows * (7 + blocks), dtype=torch.int32)
        self._device = self._host.to(device) if device.type != "cpu" else self._host.clone()
        self._host_views = _views(self._host, rows)
        self.token_ids, self.positions, self._slots, self._contexts, self._tables = _views(self._device, rows)
        self.logits_rows = torch.arange(rows, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def write(self, inputs: ModelInputs, rows: int) -> None:
        """Put in `inputs`, padded to `rows`."""
        given = inputs.context_lens.shape[0]
        ids, positions, slots, contexts, tables = self._host_views
        for view, values, padding in (
            (ids, inputs.token_ids, 0),
            (positions, inputs.positions, 0),
            (slots, inputs.slots, -1),
            (contexts, inputs.context_lens, 0),
        ):
            view[:given] = values
            view[given:rows] = padding
        # What an earlier step left beyond is not read.
        tables[:given, : inputs.block_tables.shape[1]] = inputs.block_tables
        used = self._host[: 7 * self._rows + rows * tables.shape[1]]
        if self._device.device.type == "cuda":
            # A fresh pinned copy, for the last step's may still be on its way. Its memory comes from torch's cache,
            # which gives it out again only when the copy is done.
            used = used.pin_memory()
        self._device[: used.shape[0]].copy_(used, non_blocking=True)

    def batch(self, rows: int, context: int) -> PagedBatch:
        """The first `rows` sequences, each of at most `context` tokens."""
        return PagedBatch(
            slots=self._slots[:rows],
            query_starts=self._starts[: rows + 1],
            context_lens=self._contexts[:rows],
            block_tables=self._tables[:rows],
            starts=tuple(range(rows + 1)),
            contexts=(context,) * rows,
        )


def _views(words: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token ids, positions and slots int64 [rows], contexts int32 [rows], tables int32 [rows, blocks] in `words`."""
    ids, positions, slots = words[: 6 * rows].view(torch.int64).view(3, rows)
    return ids, positions, slots, words[6 * rows : 7 * rows], words[7 * rows :].view(rows, -1)


class DecodeGraphs:
    """Runs decode steps of a model that has a shortcut. Owned by the model's thread; void once the KV cache moves.

    A rung is first run eagerly (kernels are compiled then, which no capture allows), recorded when it is met again,
    and replayed from then on. Once the graphs take `memory` bytes no more are recorded.
    """

    def __init__(
        self,
        shortcut: Shortcut,
        step: Step,
        recorder: Recorder,
        device: torch.device,
        *,
        max_rows: int,
        max_context: int,
        block_size: int,
        memory: int = MEMORY,
    ) -> None:
        """`max_rows`: the most sequences of a step, if the ladder reaches so far."""
        assert isinstance(step.backend, CapturableBackend)
        self._shortcut = shortcut
        self._step = step
        self._backend = step.backend
        self._recorder = recorder
        self._rows = _ladder(ROWS, max_rows)
        self._contexts = _ladder(CONTEXTS, max_context)
        self._inputs = StaticInputs(self._rows[-1], -(-max_context // block_size), device)
        self._logits: Tensor | None = None  # [rows, V], where every graph leaves its logits
        self._tables: dict[Room, BoundSegments] = {}
        self._met: set[Rung] = set()
        self._graphs: dict[Rung, Callable[[], None]] = {}
        self._left = memory

    @property
    def count(self) -> int:
        """Graphs that are recorded."""
        return len(self._graphs)

    def run(self, inputs: ModelInputs) -> Tensor | None:
        """Logits [R, V] of a step that may be replayed, good until the next one; None if it must run eagerly."""
        rung = self._rung(inputs)
        if rung is None:
            return None
        replay = self._graphs.get(rung)
        if replay is None and rung in self._met:
            if self._left <= 0:
                return None
            replay = self._record(rung)
            if replay is None:
                return None
        self._inputs.write(inputs, rung.rows)
        if rung.adapters is not None:
            self._backend.rebind(inputs.segments, self._bound(rung))
        if replay is None:
            self._launch(rung)
            self._met.add(rung)
        else:
            replay()
        assert self._logits is not None
        return self._logits[: inputs.token_ids.shape[0]]

    def _rung(self, inputs: ModelInputs) -> Rung | None:
        """The lowest rung that holds the step; None if none does."""
        rows = inputs.context_lens.shape[0]
        if inputs.token_ids.shape[0] != rows or inputs.logits_rows.shape[0] != rows:
            return None
        height, context = _step_up(self._rows, rows), _step_up(self._contexts, int(inputs.context_lens.max()))
        if height is None or context is None:
            return None
        if not inputs.segments:
            return Rung(height, context, None)
        room = _room(inputs.segments, height)
        return None if room is None else Rung(height, context, room)

    def _bound(self, rung: Rung) -> BoundSegments:
        room = rung.adapters
        if room is None:
            return self._backend.bind(())
        if room not in self._tables:
            self._tables[room] = self._backend.reserve_segments(
                room.segments, room.covered, room.rank, extras=room.extras
            )
        return self._tables[room]

    def _launch(self, rung: Rung) -> None:
        """All launches of a step, over the static inputs; nothing here may look at what they hold."""
        step, rows = self._step, rung.rows
        inputs = self._inputs
        step.batch, step.segments = inputs.batch(rows, rung.context), self._bound(rung)
        try:
            logits = self._shortcut.run(inputs.token_ids[:rows], inputs.positions[:rows], inputs.logits_rows[:rows])
        finally:
            step.batch, step.segments = None, self._backend.bind(())
        if self._logits is None:
            self._logits = logits.new_empty(self._rows[-1], logits.shape[1])
        self._logits[:rows].copy_(logits)

    def _record(self, rung: Rung) -> Callable[[], None] | None:
        """None if it cannot be recorded: the step then runs without, and nothing more is recorded."""
        before = self._recorder.free_bytes()
        try:
            replay = self._recorder.record(lambda: self._launch(rung))
        except RuntimeError as error:
            log.warning("no CUDA graph for %s (%s); such steps run launch by launch, slower", rung, error)
            self._left = 0
            return None
        self._graphs[rung] = replay
        self._left -= before - self._recorder.free_bytes()
        if self._left <= 0:
            log.warning("%d CUDA graphs have taken their memory; further kinds of steps run without", self.count)
        return replay


def _ladder(steps: Sequence[int], most: int) -> tuple[int, ...]:
    """The steps below `most`, and `most` itself if the ladder reaches it."""
    below = tuple(s for s in steps if s < most)
    return below if most > steps[-1] else (*below, most)


def _step_up(steps: Sequence[int], needed: int) -> int | None:
    return next((s for s in steps if s >= needed), None)


def _room(segments: Sequence[Segment], rows: int) -> Room | None:
    """The least room for these segments over `rows` rows; None if there is none so large."""
    adapters: list[AdapterWeights] = []
    for segment in segments:
        assert isinstance(segment.sites, AdapterWeights)
        adapters.append(segment.sites)
    count = _step_up(SEGMENTS, len(segments))
    rank = _step_up(RANKS, max(adapter.max_rank for adapter in adapters))
    times = _step_up(MIXES, -(-sum(segment.stop - segment.start for segment in segments) // rows))
    if count is None or rank is None or times is None:
        return None
    return Room(count, times * rows, rank, any(adapter.extras for adapter in adapters))

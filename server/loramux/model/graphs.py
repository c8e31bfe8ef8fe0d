"""Decode steps as recorded launches, replayed: a ladder of CUDA graphs over inputs at addresses that stay.

A decode step of an 8B model is some hundreds of launches of a few microseconds each; without graphs the host takes
longer to make them than the device to run them. A graph fixes addresses and grids, so here
- the inputs live in tensors that are written in place before each replay (`StaticInputs`);
- a step of R sequences runs in the lowest graph that holds it; rows beyond R are padding (no slot, no context);
- adapters are found through a table of addresses that is rewritten in place: no graph knows any adapter, so none is
  invalid after a swap.

The ladder is recorded before anything is served, and never after: a capture halts every stream. Decode steps (one row
a sequence) that no graph holds run eagerly, and so does everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loramux.model.inputs import ModelInputs
from loramux.model.shortcut import Shortcut
from loramux.model.step import Step
from loramux.ops.backend import BoundSegments
from loramux.ops.device import device_errors, out_of_memory
from loramux.ops.fused import CapturableBackend
from loramux.ops.paged import PagedBatch
from loramux.ops.segment import AdapterWeights, Segment

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Far apart: what a graph is too long for costs programs that find nothing, and the copy of a block table.
CONTEXTS = (1024, 8192, 65536, 262144)
RANKS = (16, 64)  # of adapters without extras, one a row
MOST_RANK = 256  # of any
# What the tensors between all graphs' launches may take of the device. What the driver keeps of each launch comes on
# top.
MEMORY = 512 << 20


@dataclass(frozen=True, slots=True)
class SegmentBounds:
    """The bounds of a static table of segments: see `CapturableBackend.reserve_segments`."""

    segments: int
    covered: int
    rank: int
    extras: bool

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> SegmentBounds:
        """What these segments, all of adapters, need."""
        adapters: list[AdapterWeights] = []
        for segment in segments:
            assert isinstance(segment.sites, AdapterWeights)
            adapters.append(segment.sites)
        return cls(
            len(segments),
            sum(segment.stop - segment.start for segment in segments),
            max(adapter.max_rank for adapter in adapters),
            any(adapter.extras for adapter in adapters),
        )

    def holds(self, other: SegmentBounds) -> bool:
        """Whether the other is no larger in anything."""
        return (
            other.segments <= self.segments
            and other.covered <= self.covered
            and other.rank <= self.rank
            and other.extras <= self.extras
        )


NO_ADAPTERS = SegmentBounds(0, 0, 0, False)


@dataclass(frozen=True, slots=True)
class Rung:
    """What a graph is recorded for; a step fits if it needs no more of anything.

    rows     sequences, one row each
    context  tokens of the longest
    adapters NO_ADAPTERS: the base alone
    """

    rows: int
    context: int
    adapters: SegmentBounds

    def holds(self, other: Rung) -> bool:
        """Whether a step that needs the other can run in this one's graph."""
        return other.rows <= self.rows and other.context <= self.context and self.adapters.holds(other.adapters)


def ladder(max_rows: int, max_context: int, max_mix: int) -> tuple[Rung, ...]:
    """The rungs for steps of at most `max_rows` sequences of at most `max_context` tokens, most wanted ones first.

    For each number of rows and each context four: the base; one adapter a row of a small and of a middle rank; and
    whatever else, with every second row a mix of two, or one of `max_mix`. Steps with more of a mix fit
    where there are more rows. The most rows go first, so that the others find memory that these have left.
    """
    return tuple(
        rung
        for context in _steps(CONTEXTS, max_context)
        for same in zip(*(_variants(rows, context, max_mix) for rows in reversed(_steps(ROWS, max_rows))), strict=True)
        for rung in same
    )


def _variants(rows: int, context: int, max_mix: int) -> tuple[Rung, ...]:
    most = max(2 * rows, max_mix)
    every = [
        NO_ADAPTERS,
        *(SegmentBounds(rows, rows, rank, False) for rank in RANKS),
        SegmentBounds(most, most, MOST_RANK, True),
    ]
    return tuple(Rung(rows, context, bounds) for bounds in every)


def _steps(steps: Sequence[int], most: int) -> tuple[int, ...]:
    """The steps below `most`, and `most` itself if they reach it."""
    below = tuple(s for s in steps if s < most)
    return below if most > steps[-1] else (*below, most)


class Recorder(Protocol):
    """Records the launches of a function without running them, and says what the recordings hold."""

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """What runs the same launches on the same addresses again. Raises RuntimeError (OutOfMemoryError is one)."""
        ...

    def held_bytes(self) -> int:
        """Memory of the device that belongs to the recordings alone."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they never run side by side, and none leaves anything in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # thread_local: meanwhile, other threads may allocate and copy (an adapter that is being loaded).
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                launch()
        finally:
            torch.cuda.set_stream(before)  # which a capture that ends in an error does not do
        replay: Callable[[], None] = graph.replay
        return replay

    def held_bytes(self) -> int:
        return pool_bytes(torch.cuda.memory_snapshot(), self._pool)


def pool_bytes(segments: Iterable[Mapping[str, Any]], pool: tuple[int, int]) -> int:
    """Bytes of `torch.cuda.memory_snapshot()`'s segments that belong to `pool`.

    The device's free memory would not do: it also moves with whatever other threads place, and with what torch's
    cache takes and gives back.
    """
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))


class StaticInputs:
    """The inputs of one decode step, at addresses that stay for each rung; one copy writes them all.

    One buffer of 32-bit words, laid out for each rung by itself, so that no more than its rows, and no more blocks
    than its context has, are copied: token ids, positions and slots (64 bits each), context lengths, block tables.
    """

    def __init__(self, rows: int, context: int, block_size: int, device: torch.device) -> None:
        """For rungs of at most so many rows and tokens."""
        self._block_size = block_size
        self._host = torch.zeros(rows * (7 + self._blocks(context)), dtype=torch.int32)
        self._device = self._host.to(device) if device.type != "cpu" else self._host.clone()
        self.logits_rows = torch.arange(rows, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def write(self, inputs: ModelInputs, rung: Rung) -> None:
        """Put in `inputs`, padded to the rung's rows."""
        given = inputs.context_lens.shape[0]
        ids, positions, slots, contexts, tables = self._views(self._host, rung)
        for view, values, padding in (
            (ids, inputs.token_ids, 0),
            (positions, inputs.positions, 0),
            (slots, inputs.slots, -1),
            (contexts, inputs.context_lens, 0),
        ):
            view[:given] = values
            view[given:] = padding
        # What an earlier step left beyond is not read.
        columns = min(inputs.block_tables.shape[1], tables.shape[1])
        tables[:given, :columns] = inputs.block_tables[:, :columns]
        used = self._host[: self._words(rung)]
        if self._device.device.type == "cuda":
            # A fresh pinned copy, for the last step's may still be on its way. Its memory comes from torch's cache,
            # which gives it out again only when the copy is done.
            used = used.pin_memory()
        self._device[: used.shape[0]].copy_(used, non_blocking=True)

    def clear(self, rung: Rung) -> None:
        """Only padding: a step that reads no key, writes none, and may run over any cache."""
        none = torch.zeros(0, dtype=torch.int32)
        empty = none.long()
        self.write(ModelInputs(empty, empty, empty, none, none, none[:, None], empty), rung)

    def views(self, rung: Rung) -> tuple[Tensor, Tensor, PagedBatch]:
        """Token ids and positions [rows] on the device, and the batch of the rung's sequences."""
        rows = rung.rows
        ids, positions, slots, contexts, tables = self._views(self._device, rung)
        batch = PagedBatch(
            slots=slots,
            query_starts=self._starts[: rows + 1],
            context_lens=contexts,
            block_tables=tables,
            starts=tuple(range(rows + 1)),
            contexts=(rung.context,) * rows,
        )
        return ids, positions, batch

    def _blocks(self, context: int) -> int:
        return -(-context // self._block_size)

    def _words(self, rung: Rung) -> int:
        return rung.rows * (7 + self._blocks(rung.context))

    def _views(self, words: Tensor, rung: Rung) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token ids, positions and slots int64 [rows], contexts int32 [rows], tables int32 [rows, blocks]."""
        rows = rung.rows
        ids, positions, slots = words[: 6 * rows].view(torch.int64).view(3, rows)
        return ids, positions, slots, words[6 * rows : 7 * rows], words[7 * rows : self._words(rung)].view(rows, -1)


class DecodeGraphs:
    """Runs decode steps of a model that has a shortcut. Owned by the model's thread; void once the KV cache moves."""

    def __init__(
        self,
        shortcut: Shortcut,
        step: Step,
        recorder: Recorder,
        device: torch.device,
        *,
        rungs: Sequence[Rung],
        block_size: int,
        memory: int = MEMORY,
    ) -> None:
        """Nothing is recorded yet. `memory`: bytes from which on no more graphs are."""
        assert isinstance(step.backend, CapturableBackend)
        self._shortcut = shortcut
        self._step = step
        self._backend = step.backend
        self._recorder = recorder
        self._rungs = tuple(rungs)
        self._most_rows = max(rung.rows for rung in rungs)
        self._inputs = StaticInputs(self._most_rows, max(rung.context for rung in rungs), block_size, device)
        self._memory = memory
        self._logits: Tensor | None = None  # [rows, V], where every graph leaves its logits
        self._tables: dict[SegmentBounds, BoundSegments] = {}
        self._graphs: dict[Rung, Callable[[], None]] = {}
        self.captures = 0

    @property
    def count(self) -> int:
        """Graphs that are recorded."""
        return len(self._graphs)

    def capture(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Record the ladder. Each rung runs once before, on padding, for no capture allows what a first launch does
        (compiling, loading). What cannot be recorded is told and left out; where memory was short, it is tried again
        at the end.
        """
        total, failed = len(self._rungs), dict[Rung, RuntimeError]()
        for done, rung in enumerate(self._rungs, 1):
            self._capture(rung, failed)
            progress(done, total)
        for rung in [rung for rung, error in failed.items() if out_of_memory(error)]:
            self._capture(rung, failed)
        slower = "their steps run in larger ones, or launch by launch, slower"
        for rung, error in failed.items():
            log.warning("no CUDA graph for %d of %d, %s first (%s): %s", len(failed), total, rung, error, slower)
            break
        if self.count + len(failed) < total:
            log.warning("%d of %d CUDA graphs have taken the others' memory: %s", self.count, total, slower)
        # From the cheapest up, so that the first that holds a step is the one to run it in.
        self._graphs = dict(sorted(self._graphs.items(), key=lambda item: _cost(item[0])))

    def run(self, inputs: ModelInputs) -> Tensor | None:
        """Logits [R, V] of a step that a graph holds, good until the next one; None if it must run eagerly."""
        rows = inputs.context_lens.shape[0]
        if inputs.token_ids.shape[0] != rows or inputs.logits_rows.shape[0] != rows or rows > self._most_rows:
            return None
        adapters = SegmentBounds.of(inputs.segments) if inputs.segments else NO_ADAPTERS
        needed = Rung(rows, int(inputs.context_lens.max()), adapters)
        rung = next((rung for rung in self._graphs if rung.holds(needed)), None)
        if rung is None:
            return None
        self._inputs.write(inputs, rung)
        if rung.adapters != NO_ADAPTERS:
            self._backend.rebind(inputs.segments, self._tables[rung.adapters])
        self._graphs[rung]()
        assert self._logits is not None
        return self._logits[:rows]

    def _capture(self, rung: Rung, failed: dict[Rung, RuntimeError]) -> None:
        """Record one, or say in `failed` why not; nothing if there is no memory left for it."""
        if self._recorder.held_bytes() >= self._memory:
            return
        bounds = rung.adapters
        try:
            with device_errors():
                if bounds != NO_ADAPTERS and bounds not in self._tables:
                    self._tables[bounds] = self._backend.reserve_segments(
                        bounds.segments, bounds.covered, bounds.rank, extras=bounds.extras
                    )
                self._inputs.clear(rung)
                with torch.inference_mode():
                    self._launch(rung)
                    self._graphs[rung] = self._recorder.record(lambda: self._launch(rung))
        except RuntimeError as error:
            failed[rung] = error.with_traceback(None)  # whose frames hold what was computed, where memory is short
        else:
            self.captures += 1
            failed.pop(rung, None)

    def _launch(self, rung: Rung) -> None:
        """All launches of a step, over the static inputs; nothing here may look at what they hold."""
        step, rows = self._step, rung.rows
        nothing = self._backend.bind(())
        ids, positions, step.batch = self._inputs.views(rung)
        step.segments = nothing if rung.adapters == NO_ADAPTERS else self._tables[rung.adapters]
        try:
            logits = self._shortcut.run(ids, positions, self._inputs.logits_rows[:rows])
        finally:
            step.batch, step.segments = None, nothing
        if self._logits is None:
            self._logits = logits.new_empty(self._most_rows, logits.shape[1])
        self._logits[:rows].copy_(logits)


def _cost(rung: Rung) -> tuple[int, ...]:
    bounds = rung.adapters
    return rung.rows, bounds.rank, bounds.covered, rung.context

"""Which tokens of which sequences go through the model next. Policy only: imports no torch, moves no tensor.

The order of service is static: arrival, less priority x priority_seconds. So whatever comes later than that
long waits behind, and nobody waits for ever. Within a step, running sequences' next tokens come first, then
prefill chunks in that order; while sequences decode, the chunks are no larger than what keeps a step near
step_target, lest a long prompt hold the others up. A sequence that may not start yet (its adapter is loading)
is passed over and keeps its place; one that may but does not fit stops the admission of those behind it, for
small requests would starve a large one otherwise.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import takewhile

from loramux.engine.kv_cache import KVCache
from loramux.engine.sequence import Sequence, Status
from loramux.engine.settings import EngineSettings
from loramux.engine.step_costs import StepCosts


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens start ≤ i < stop of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def wants_logits(self) -> bool:
        """Its last token is the last one known, so the next one can be sampled."""
        return self.stop == len(self.sequence.tokens)


class Scheduler:
    """Owns the waiting and the running sequences, each sorted by rank. Only the engine's thread calls it."""

    def __init__(self, kv: KVCache, settings: EngineSettings) -> None:
        self.kv = kv
        self.settings = settings
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._costs = StepCosts()
        self._faults: list[tuple[Sequence, Exception]] = []

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=_rank)

    def remove(self, seq: Sequence) -> None:
        """The sequence ends, wherever it is: frees its blocks and its place. Doing it twice is harmless."""
        if seq.status is Status.RUNNING:
            _take_out(self.running, seq)
        elif seq.status is Status.WAITING:
            _take_out(self.waiting, seq)
        seq.status = Status.FINISHED
        self.kv.release(seq)

    def schedule(self) -> list[Row]:
        """The rows of the next step, at most max_batch_tokens tokens of max_batch_rows sequences.

        Blocks for them are reserved. Empty only if no sequence may run now, or if some cannot: see `take_faults`.
        """
        preemptions = self.preemptions
        rows = self._next_tokens()
        # Who was just put out of the KV cache must not come back in the same step to put out another.
        candidates = self.waiting if self.preemptions == preemptions else []
        self._prefill_chunks(rows, candidates)
        return rows

    def note_step(self, rows: list[Row], seconds: float) -> None:
        """A step of these rows has taken so long."""
        tokens = sum(row.stop - row.start for row in rows)
        if tokens > len(rows):
            self._costs.note(tokens, seconds)

    def take_faults(self) -> list[tuple[Sequence, Exception]]:
        """The sequences that failed when `schedule` looked at them; the caller removes them from where they are."""
        faults, self._faults = self._faults, []
        return faults

    def _next_tokens(self) -> list[Row]:
        """One row for each running sequence that has a single token to compute."""
        rows: list[Row] = []
        for seq in [seq for seq in self.running if seq.pending == 1]:
            try:
                if seq.status is Status.RUNNING and self._make_room(seq):
                    rows.append(Row(seq, seq.computed, seq.computed + 1))
            except Exception as error:
                self._faults.append((seq, error))
        return rows

    def _make_room(self, seq: Sequence) -> bool:
        """Reserve the blocks that `seq` needs, preempting from the back of the order; False if that is `seq`.

        The front sequence is never preempted and one sequence always fits alone, so there is always progress.
        """
        while not self.kv.reserve(seq):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue, at its old place; its tokens are computed again, or come from the cache."""
        self.preemptions += 1
        _take_out(self.running, seq)
        self.kv.release(seq)
        self.add(seq)

    def _prefill_chunks(self, rows: list[Row], candidates: list[Sequence]) -> None:
        """Spend the rest of the budget on prompts, running and new ones alike, in the order of service."""
        budget = self._prefill_budget(len(rows))
        started = [seq for seq in self.running if seq.pending > 1]
        admitting = True
        # Once one does not fit, those behind it are not looked at: there may be thousands.
        admissible = takewhile(lambda _: admitting, candidates.copy())
        for seq in heapq.merge(started, admissible, key=_rank):
            if budget == 0:
                return
            if seq.status is Status.WAITING:
                try:
                    if not admitting or not seq.group.may_start(seq):
                        continue
                    admitting = self._admit(seq)
                except Exception as error:
                    self._faults.append((seq, error))
                    continue
                if not admitting:
                    continue
            chunk = min(seq.pending, budget)
            budget -= chunk
            rows.append(Row(seq, seq.computed, seq.computed + chunk))

    def _prefill_budget(self, decoding: int) -> int:
        """Tokens of prompts in a step in which `decoding` sequences get their next token."""
        budget = self.settings.max_batch_tokens - decoding
        if decoding == 0 or self.settings.step_target == 0.0:
            return budget
        chunk = self._costs.chunk(decoding, self.settings.step_target)
        return budget if chunk is None else min(budget, chunk)

    def _admit(self, seq: Sequence) -> bool:
        """Start a waiting sequence if there is a place for it and blocks for all its tokens.

        One block is left free for each running sequence, lest the next tokens preempt what was just admitted.
        """
        if len(self.running) >= self.settings.max_batch_rows:
            return False
        if not self.kv.admit(seq, headroom=len(self.running)):
            return False
        _take_out(self.waiting, seq)
        seq.status = Status.RUNNING
        insort(self.running, seq, key=_rank)
        return True


def _take_out(line: list[Sequence], seq: Sequence) -> None:
    """Remove it from a list that is sorted by rank, which is its own: thousands may wait, and leave in any order."""
    place = bisect_left(line, seq.rank, key=_rank)
    assert line[place] is seq
    del line[place]


def _rank(seq: Sequence) -> tuple[float, int, int]:
    return seq.rank

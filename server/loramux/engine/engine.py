"""The engine: owns the model, the scheduler and the KV policy, and runs steps. Synchronous, one thread.

Knows nothing of asyncio, gRPC or adapters' names: `sink` takes a request's events, `on_finish` its lease.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from loramux.engine.batch import Batch, build_batch
from loramux.engine.detokenizer import Detokenizer
from loramux.engine.door import Limits, check_request
from loramux.engine.group import Group, Sink, make_group
from loramux.engine.kv_cache import KVCache
from loramux.engine.request import (
    Delta,
    FinishReason,
    Request,
    RequestFailed,
    SequenceFinished,
    TokenLogprob,
)
from loramux.engine.sampler import Sampled, sample
from loramux.engine.scheduler import Row, Scheduler
from loramux.engine.sequence import Sequence, Status
from loramux.engine.settings import EngineSettings
from loramux.engine.stats import EngineStats, StepSeconds
from loramux.errors import EngineFault, LoramuxError, Overloaded
from loramux.model.inputs import ModelInputs

log = logging.getLogger(__name__)

NO_MEMORY_TEXT = "the device ran out of memory in a step of this request; ask again when less is running"
LONGEST_IDLE = 3600.0  # seconds; deadlines may be so far away that no wait takes them
FAULT_TEXT = "the engine failed while it ran this request; the server's log has the details"


class Model(Protocol):
    """All that the engine asks of a model, which holds num_kv_blocks KV blocks of block_size tokens."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def num_kv_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def asynchronous(self) -> bool:
        """Whether `forward` only launches work on a device, and reading its logits waits for it."""
        ...

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Write the keys and values of all rows, return logits [R, vocab_size] of `inputs.logits_rows`."""
        ...


class Engine:
    """Requests enter by `submit` and leave by `finish`, whatever happens to them in between."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        settings: EngineSettings,
        *,
        on_finish: Callable[[Request], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_finish` is called exactly once for each submitted request, before its last event."""
        self.model = model
        self.settings = settings
        self.kv = KVCache(model.num_kv_blocks, model.block_size, prefix_caching=settings.prefix_caching)
        self.scheduler = Scheduler(self.kv, settings)
        self.limits = Limits(
            vocab_size=model.vocab_size,
            max_context=min(model.max_context, model.num_kv_blocks * model.block_size),
            settings=settings,
        )
        self._detokenizer = Detokenizer(tokenizer)
        self._on_finish = on_finish
        self._clock = clock
        self._groups: dict[Request, Group] = {}  # by identity: callers choose request ids, and may choose one twice
        self._serial = itertools.count()
        self._seconds = StepSeconds()
        self._consecutive_faults = 0
        self._faults = self._steps = self._computed = self._generated = self._finished = 0

    def check(self, request: Request) -> None:
        """The door. Raises InvalidRequest. Any thread may call it: limits never change."""
        check_request(
            request.sampling,
            request.prompt_ids,
            self.limits,
            request_id=request.request_id,
            cache_salt=request.cache_salt,
            priority=request.priority,
            adapters=request.adapters,
        )

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request that has passed `check`; its events go to `sink` in later steps, in this thread."""
        seed = request.sampling.seed
        arrival = request.arrival or self._clock()
        group = make_group(
            request,
            sink,
            seed=secrets.randbits(64) if seed is None else seed,
            rank=(arrival - request.priority * self.settings.priority_seconds, next(self._serial)),
            arrival=arrival,
            max_context=self.limits.max_context,
            eos_token_ids=self.model.eos_token_ids,
            detokenizer=self._detokenizer,
        )
        self._groups[request] = group
        for seq in group.sequences:
            self.scheduler.add(seq)

    def abort(self, request: Request, error: LoramuxError) -> None:
        """End a request with `error`, queued or running. A request that has ended already is left alone."""
        group = self._groups.get(request)
        if group is not None:
            self.finish(group, RequestFailed(error))

    def step(self) -> bool:
        """Compute one batch; False if there was nothing to compute."""
        batch = self.prepare()
        if batch is not None:
            self.compute(batch)
        return batch is not None

    def prepare(self) -> Batch | None:
        """Choose and lay out the next batch, for `compute`, which must follow at once; None if there is nothing."""
        lap = _Laps(self._seconds, self._clock)
        self._end_the_doomed()
        while rows := self.scheduler.schedule():
            self._note_starts(rows)
            lap("schedule")
            try:
                batch = build_batch(rows, self.kv.block_size)
            except Exception as error:
                self._survive(error, rows)
                continue
            lap("build")
            return batch
        lap("schedule")
        return None

    def compute(self, batch: Batch, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Run the model on the batch and give its tokens out. `meanwhile` is called once, when the host has nothing to
        do for the batch: before a model that computes here, and where it only launches, after it."""
        if not self.model.asynchronous:
            meanwhile()
        lap = _Laps(self._seconds, self._clock)
        try:
            with torch.inference_mode():
                logits = self.model.forward(batch.inputs)
            lap("forward")
        except Exception as error:
            self._survive(error, batch.rows)
            return
        finally:
            if self.model.asynchronous:
                meanwhile()
        lap = _Laps(self._seconds, self._clock)
        try:
            tokens = sample(logits, batch.sampled)
            lap("sample")
        except Exception as error:
            self._survive(error, batch.rows)
            return
        self._deliver(batch, tokens)
        lap("deliver")

    def finish(self, group: Group, last: SequenceFinished | RequestFailed) -> None:
        """The one way out of every request: frees its blocks, its places and its lease, then says `last`."""
        if self._groups.pop(group.request, None) is None:
            return
        self._finished += 1
        for seq in group.sequences:
            self.scheduler.remove(seq)
        self._on_finish(group.request)
        group.sink(last)

    def idle_seconds(self) -> float | None:
        """How long to sleep after a step that found nothing to do; None: until something is submitted."""
        now = self._clock()
        waits = [g.request.deadline - now for g in self._groups.values() if g.request.deadline is not None]
        if any(group.loading for group in self._groups.values()):
            waits.append(self.settings.load_poll_seconds)
        return min(max(0.0, min(waits)), LONGEST_IDLE) if waits else None

    @property
    def healthy(self) -> bool:
        """False once max_consecutive_faults steps in a row have failed, until one succeeds."""
        return self._consecutive_faults < self.settings.max_consecutive_faults

    def stats(self) -> EngineStats:
        """A snapshot; only this thread may take it, anyone may read it."""
        running: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for group in self._groups.values():
            names = [use.handle.name for use in group.uses] or [""]
            (running if group.running else waiting).update(names)
        num_running = sum(group.running for group in self._groups.values())
        return EngineStats(
            running=num_running,
            waiting=len(self._groups) - num_running,
            kv_blocks_used=self.kv.num_used,
            kv_blocks_total=self.kv.num_blocks,
            running_adapters=running,
            waiting_adapters=waiting,
            healthy=self.healthy,
            prefix_query_tokens=self.kv.query_tokens,
            prefix_hit_tokens=self.kv.hit_tokens,
            preemptions=self.scheduler.preemptions,
            faults=self._faults,
            steps=self._steps,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            finished_requests=self._finished,
            step_seconds=replace(self._seconds),
        )

    def check_books(self) -> None:
        """Raise AssertionError unless every block and every queue place belongs to a live request."""
        live = [seq for group in self._groups.values() for seq in group.sequences]
        self.kv.check(live)
        by_status = Counter(seq.status for seq in live)
        assert len(self.scheduler.waiting) == by_status[Status.WAITING], "a place in the queue has no request"
        assert len(self.scheduler.running) == by_status[Status.RUNNING], "a place in the batch has no request"

    def _end_the_doomed(self) -> None:
        """Requests whose deadline has passed or whose adapter has failed leave, wherever they are."""
        now = self._clock()
        for group in list(self._groups.values()):
            error = group.observe(now)
            if error is not None:
                self.finish(group, RequestFailed(error))

    def _note_starts(self, rows: list[Row]) -> None:
        now = self._clock()
        for row in rows:
            group = row.sequence.group
            if group.first_scheduled is None:
                group.first_scheduled = now
                group.cached_tokens = row.start

    def _survive(self, error: Exception, rows: list[Row]) -> None:
        """The step's requests fail; the rest go on if the books balance. Else AssertionError ends the engine.

        Blocks that the failed step may have half written were not offered to others: that comes after a step. A device
        without memory for this step has no fault: it may well have enough for the next one.
        """
        if isinstance(error, torch.OutOfMemoryError):
            log.warning("no memory for a step of %d rows, which fail: %s", len(rows), error)
            reason: LoramuxError = Overloaded(NO_MEMORY_TEXT, reason="DEVICE_MEMORY")
        else:
            self._faults += 1
            self._consecutive_faults += 1
            log.exception("engine fault %d in a row; %d rows fail", self._consecutive_faults, len(rows))
            reason = EngineFault(FAULT_TEXT)
        for row in rows:
            self.finish(row.sequence.group, RequestFailed(reason))
        self.check_books()

    def _deliver(self, batch: Batch, tokens: list[Sampled | None]) -> None:
        """Account for what was computed, then give each sampled token to its sequence."""
        self._consecutive_faults = 0
        self._steps += 1
        for row in batch.rows:
            seq = row.sequence
            self._computed += row.stop - row.start
            seq.computed = row.stop
            seq.group.prompt_computed |= row.stop >= len(seq.group.request.prompt_ids)
            self.kv.commit(seq)
        now = self._clock()
        for seq, token in zip(batch.sampled, tokens, strict=True):
            if seq.status is Status.RUNNING:  # else a sequence of the same request failed a moment ago
                self._accept(seq, token, now)

    def _accept(self, seq: Sequence, token: Sampled | None, now: float) -> None:
        """One sequence's new token. A failure here concerns this request alone."""
        group = seq.group
        try:
            if token is None:
                raise FloatingPointError("the model's logits are not finite")
            text, reason = seq.accept(token.token_id)
            delta = Delta(seq.index, text, [token.token_id], self._logprobs(token))
        except Exception:
            log.exception("request %r fails", group.request.request_id)
            self.finish(group, RequestFailed(EngineFault(FAULT_TEXT)))
            return
        self._generated += 1
        group.last_token = now
        if group.first_token is None:
            group.first_token = now
        group.sink(delta)
        if reason is not None:
            self._end_sequence(seq, reason)

    def _end_sequence(self, seq: Sequence, reason: FinishReason) -> None:
        group = seq.group
        group.unfinished -= 1
        last = group.unfinished == 0
        event = SequenceFinished(seq.index, reason, seq.scanner.found, group.usage(), group.timings(), last=last)
        if last:
            self.finish(group, event)
        else:
            self.scheduler.remove(seq)
            group.sink(event)

    def _logprobs(self, token: Sampled) -> list[TokenLogprob]:
        if token.logprob is None:
            return []
        text = self._detokenizer.token_text
        top = tuple(TokenLogprob(i, text(i), logprob) for i, logprob in token.top)
        return [TokenLogprob(token.token_id, text(token.token_id), token.logprob, top)]


class _Laps:
    """Adds the time since the last call to one part of StepSeconds.

    On a GPU `forward` is the time to launch it; the wait for its result shows in `sample`.
    """

    def __init__(self, seconds: StepSeconds, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._since = clock()

    def __call__(self, part: str) -> None:
        now = self._clock()
        setattr(self._seconds, part, getattr(self._seconds, part) + now - self._since)
        self._since = now

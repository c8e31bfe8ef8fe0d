"""The engine: owns the model, the scheduler and the KV policy, and runs steps. Synchronous, one thread.

Knows nothing of asyncio, gRPC or adapters' names: `sink` takes a request's events, `on_finish` its lease.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
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
    SamplingParams,
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
from loramux.ops.device import device_errors, out_of_memory

log = logging.getLogger(__name__)

NO_MEMORY_TEXT = "the device ran out of memory in a step of this request; ask again when less is running"
LONGEST_IDLE = 3600.0  # seconds; deadlines may be so far away that no wait takes them
FAULT_TEXT = "the engine failed while it ran this request; the server's log has the details"

_MOST_SHOWN = 64  # requests in one log line


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

    @property
    def compilations(self) -> int:
        """What was made ready so far, kernels and graphs: once a model serves it should be no more."""
        ...

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Write the keys and values of all rows, return logits [R, vocab_size] of `inputs.logits_rows`."""
        ...


class Engine:
    """Requests enter by `submit` and leave by `finish`, whatever happens to them in between.

    But for DeviceLost, which comes out of whatever computes: then nothing more can be done here.
    """

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
        self._compilations = model.compilations  # what comes after this halts streams
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
        group = self._group(request, sink, seed=secrets.randbits(64) if seed is None else seed)
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
        while rows := self._schedule():
            self._note_starts(rows)
            lap("schedule")
            batch = self._build(rows)
            lap("build")
            if batch is not None:
                return batch
        lap("schedule")
        return None

    def compute(self, batch: Batch, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Run the model on the batch and give its tokens out. `meanwhile` is called once, when the host has nothing to
        do for the batch: before a model that computes here, and where it only launches, after it."""
        if not self.model.asynchronous:
            meanwhile()
        steps, faults = self._steps, self._faults
        failure: Exception | None = None
        started = self._clock()
        lap = _Laps(self._seconds, self._clock)
        try:
            logits = self._forward(batch)
            lap("forward")
        except Exception as error:
            failure = error
        finally:
            if self.model.asynchronous:
                meanwhile()
        if failure is None:
            self._conclude(batch, logits)
            self.scheduler.note_step(batch.rows, self._clock() - started)
        else:
            self._isolate(batch.rows, failure)
        if self._steps == steps and self._faults > faults:
            self._note_failed_step()

    def finish(self, group: Group, last: SequenceFinished | RequestFailed) -> None:
        """The one way out of every request: frees its blocks, its places and its lease, then says `last`."""
        if self._groups.pop(group.request, None) is None:
            return
        self._finished += 1
        for seq in group.sequences:
            self.scheduler.remove(seq)
        for tell in (partial(self._on_finish, group.request), partial(group.sink, last)):
            try:
                tell()
            except Exception:  # a defect of the owner; the step's other requests must not suffer from it
                log.exception("the owner of request %r could not be told of its end", group.request.shown_id)

    def idle_seconds(self) -> float | None:
        """How long to sleep after a step that found nothing to do; None: until something is submitted."""
        now = self._clock()
        waits = [g.request.deadline - now for g in self._groups.values() if g.request.deadline is not None]
        if any(group.loading for group in self._groups.values()):
            waits.append(self.settings.load_poll_seconds)
        return min(max(0.0, min(waits)), LONGEST_IDLE) if waits else None

    @property
    def healthy(self) -> bool:
        """False once max_consecutive_faults steps in a row have failed for no request's fault, until one succeeds."""
        return self._consecutive_faults < self.settings.max_consecutive_faults

    def stats(self) -> EngineStats:
        """A snapshot; only this thread may take it, anyone may read it."""
        running: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        active = {seq.group for seq in self.scheduler.running}
        for group in self._groups.values():
            names = [use.handle.name for use in group.uses] or [""]
            (running if group in active else waiting).update(names)
        return EngineStats(
            running=len(active),
            waiting=len(self._groups) - len(active),
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
            late_compilations=self.model.compilations - self._compilations,
            step_seconds=replace(self._seconds),
        )

    def check_books(self) -> None:
        """Raise AssertionError unless every block and every queue place belongs to a live request."""
        live = [seq for group in self._groups.values() for seq in group.sequences]
        self.kv.check(live)
        by_status = Counter(seq.status for seq in live)
        assert len(self.scheduler.waiting) == by_status[Status.WAITING], "a place in the queue has no request"
        assert len(self.scheduler.running) == by_status[Status.RUNNING], "a place in the batch has no request"

    def _group(self, request: Request, sink: Sink, *, seed: int) -> Group:
        arrival = request.arrival or self._clock()
        return make_group(
            request,
            sink,
            seed=seed,
            rank=(arrival - request.priority * self.settings.priority_seconds, next(self._serial)),
            arrival=arrival,
            max_context=self.limits.max_context,
            eos_token_ids=self.model.eos_token_ids,
            detokenizer=self._detokenizer,
        )

    def _end_the_doomed(self) -> None:
        """Requests whose deadline has passed or whose adapter has failed leave, wherever they are."""
        now = self._clock()
        for group in list(self._groups.values()):
            try:
                error = group.observe(now)
            except Exception as fault:
                self._fail([group], fault)
                continue
            if error is not None:
                self.finish(group, RequestFailed(error))

    def _schedule(self) -> list[Row]:
        """The scheduler's rows, without those of requests that failed when it looked at them."""
        while True:
            rows = self.scheduler.schedule()
            faults = self.scheduler.take_faults()
            for seq, error in faults:
                self._fail([seq.group], error)
            rows = [row for row in rows if row.sequence.status is Status.RUNNING]
            if rows or not faults:
                return rows

    def _note_starts(self, rows: list[Row]) -> None:
        now = self._clock()
        for row in rows:
            progress = row.sequence.group.progress
            if progress.first_scheduled is None:
                progress.first_scheduled = now
                progress.cached_tokens = row.start

    def _build(self, rows: list[Row]) -> Batch | None:
        """The batch of these rows, without the requests that cannot be laid out; None if none can."""
        try:
            return build_batch(rows, self.kv.block_size)
        except Exception:
            log.exception("a batch of %d rows cannot be laid out; its requests are tried one by one", len(rows))
        sound: list[Row] = []
        for group, own in _by_request(rows):
            try:
                build_batch(own, self.kv.block_size)
                sound += own
            except Exception as error:
                self._fail([group], error)
        try:
            return build_batch(sound, self.kv.block_size) if sound else None
        except Exception as error:
            self._fail([group for group, _ in _by_request(sound)], error)
            return None

    def _forward(self, batch: Batch) -> Tensor:
        with torch.inference_mode(), device_errors():
            return self.model.forward(batch.inputs)

    def _sample(self, logits: Tensor, seqs: list[Sequence]) -> list[Sampled | None]:
        """Waits for the device, which tells of what went wrong in `_forward` only now."""
        with device_errors():
            return sample(logits, seqs)

    def _conclude(self, batch: Batch, logits: Tensor) -> None:
        """What comes after the model, for each request by itself."""
        lap = _Laps(self._seconds, self._clock)
        tokens: list[Sampled | None] | None = None
        try:
            tokens = self._sample(logits, batch.sampled)
        except Exception:
            log.exception("%d rows cannot be sampled together; they are sampled one by one", len(batch.sampled))
        if tokens is None:  # out of the error's reach, whose frames hold what the device may have no memory for twice
            tokens = [self._sample_alone(logits[i : i + 1], seq) for i, seq in enumerate(batch.sampled)]
        lap("sample")
        self._deliver(batch, tokens)
        lap("deliver")

    def _sample_alone(self, logits: Tensor, seq: Sequence) -> Sampled | None:
        """A token for logits [1, V]; if that fails, None, and the request has ended."""
        try:
            return self._sample(logits, [seq])[0]
        except Exception as error:
            self._fail([seq.group], error)
            return None

    def _isolate(self, rows: list[Row], error: Exception) -> None:
        """A step of these rows has failed: halves of it are run, and halves of those that fail, until each request has
        its token or has failed alone. No token was given out, and what is written into the KV cache again is the same.

        Where the device has no memory, all of them fail: it may have enough for the next step.
        """
        requests = _by_request(rows)
        if len(requests) == 1 or out_of_memory(error):
            self._fail([group for group, _ in requests], error)
            return
        log.error("a step of %d requests failed; halves of it are run", len(requests), exc_info=error)
        middle = len(requests) // 2
        for half in (requests[:middle], requests[middle:]):
            again = [row for _, own in half for row in own]
            try:
                batch = build_batch(again, self.kv.block_size)
                logits = self._forward(batch)
            except Exception as fault:
                self._isolate(again, fault)
                continue
            self._conclude(batch, logits)

    def _fail(self, groups: Iterable[Group], error: BaseException) -> None:
        """These requests end; the others go on if the books balance. Else AssertionError ends the engine.

        Blocks that a failed step may have half written were not offered to others: that comes after a step. A device
        without memory for a step has no fault, and neither has an engine whose error is meant for the caller.
        """
        groups = list(groups)
        reason: LoramuxError
        if out_of_memory(error):
            log.warning("no memory for a step of %d requests, which fail: %s; %s", len(groups), error, _shown(groups))
            reason = Overloaded(NO_MEMORY_TEXT, reason="DEVICE_MEMORY")
        elif isinstance(error, LoramuxError):
            reason = error
        else:
            self._faults += 1
            log.error("engine fault; %s fail", _shown(groups), exc_info=error)
            reason = EngineFault(FAULT_TEXT)
        for group in groups:
            self.finish(group, RequestFailed(reason))
        self.check_books()

    def _note_failed_step(self) -> None:
        """No request of a step got through. That is the engine's fault only if it cannot run the base alone, either."""
        if self._works():
            return
        self._consecutive_faults += 1
        log.error("engine fault %d in a row: a token of the base fails, too", self._consecutive_faults)

    def _works(self) -> bool:
        """Whether one token of the base goes through; in a block that nobody has."""
        probe = self._group(Request("", (0,), SamplingParams(max_new_tokens=1)), lambda event: None, seed=0)
        [seq] = probe.sequences
        try:
            if not self.kv.reserve(seq):
                return False
            batch = build_batch([Row(seq, 0, 1)], self.kv.block_size)
            return self._sample(self._forward(batch), batch.sampled) != [None]
        except Exception:
            log.exception("a token of the base fails")
            return False
        finally:
            self.kv.release(seq)

    def _deliver(self, batch: Batch, tokens: list[Sampled | None]) -> None:
        """Account for what was computed, then give each sampled token to its sequence."""
        live = [row for row in batch.rows if row.sequence.status is Status.RUNNING]
        if live:
            self._consecutive_faults = 0
            self._steps += 1
        for row in live:
            seq = row.sequence
            self._computed += row.stop - row.start
            seq.computed = row.stop
            seq.group.prompt_computed |= row.stop >= len(seq.group.request.prompt_ids)
            try:
                self.kv.commit(seq)
            except Exception as error:
                self._fail([seq.group], error)
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
            self._generated += 1
            if group.progress.first_token is None:
                group.progress.first_token = now
            group.progress.last_token = now
            group.sink(delta)
            if reason is not None:
                self._end_sequence(seq, reason, now)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizer's Rust code is no Exception
            self._fail([group], error)

    def _end_sequence(self, seq: Sequence, reason: FinishReason, now: float) -> None:
        group = seq.group
        group.unfinished -= 1
        last = group.unfinished == 0
        event = SequenceFinished(seq.index, reason, seq.scanner.found, group.usage(), group.timings(now), last=last)
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


def _by_request(rows: list[Row]) -> list[tuple[Group, list[Row]]]:
    """The rows of each request, in their order."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(row.sequence.group, []).append(row)
    return list(found.items())


def _shown(groups: list[Group]) -> str:
    """For the log: the ids of some requests, not more than a reader can use."""
    ids = [repr(group.request.shown_id) for group in groups[:_MOST_SHOWN]]
    more = f" and {len(groups) - _MOST_SHOWN} more" if len(groups) > _MOST_SHOWN else ""
    return f"requests {', '.join(ids)}{more}"


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

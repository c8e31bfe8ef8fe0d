"""Connects the metrics and the log with the engine, the adapter registry and the requests that pass.

The registry belongs to the event loop's thread and scrapes come on another: `Telemetry.snapshot` therefore takes
its figures on the loop and waits for them, at most `patience` seconds; a loop that is that busy gives the last ones.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from loramux.engine.client import EngineClient
from loramux.engine.request import AdapterUse, Delta, Request, SequenceFinished
from loramux.errors import Cancelled, DeadlineExceeded, EngineFault, LoramuxError, StartupError
from loramux.logs import fields
from loramux.lora.entry import AdapterEntry, State
from loramux.lora.registry import AdapterRegistry
from loramux.metrics import Metrics, Snapshot

log = logging.getLogger(__name__)

_OK = "OK"
# A caller whose deadline passes hangs up by its own clock, which began to run a moment before ours: so near to the
# deadline (seconds, and at most a quarter of the time given) a hang-up is the deadline.
_HANGS_UP = 0.25


class RequestRecord:
    """One request to generate, from its first moment to its one outcome: its counts, and its line in the log.

    A context manager around all that is done for the request, so that whatever ends it is counted, and once. What
    the request turns out to be is set on the way: `request` when it is checked, `taken` when the engine has it.
    """

    def __init__(
        self, metrics: Metrics, request_id: str, *, asked: str = "", seconds_left: float | None = None
    ) -> None:
        """`asked`: the adapter's name as the caller wrote it; `seconds_left` to the caller's deadline, None without."""
        self.arrival = time.monotonic()
        self.deadline = None if seconds_left is None else self.arrival + seconds_left
        self.adapters: tuple[AdapterUse, ...] = ()
        self.request: Request | None = None
        self.taken = False
        self._metrics = metrics
        self._request_id = request_id
        self._asked = asked
        self._output_tokens = 0
        self._first: float | None = None
        self._latest: dict[int, float] = {}
        self._last: SequenceFinished | None = None

    def see(self, event: Delta | SequenceFinished) -> None:
        """Called with every event, when it is handed to the reader."""
        if isinstance(event, SequenceFinished):
            self._last = event if event.last else None
        elif event.token_ids:
            self._see_tokens(event.index, len(event.token_ids), time.monotonic())

    def _see_tokens(self, index: int, count: int, now: float) -> None:
        if self._first is None:
            self._first = now
            prompt = len(self.request.prompt_ids) if self.request is not None else 0
            self._metrics.prompt_computed(prompt, now - self.arrival)
        if index in self._latest:
            self._metrics.token_gap((now - self._latest[index]) / count)
        self._latest[index] = now
        self._output_tokens += count
        self._metrics.delivered(count, self._names())

    def __enter__(self) -> RequestRecord:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """The outcome: what the caller got in place of its whole answer, or None."""
        now = time.monotonic()
        status, reason = self._outcome(error, now)
        self._metrics.ended(status, reason, self._names())
        if self.taken:
            broken = "error" if status == EngineFault.status else "abort"
            self._metrics.left_the_engine(reason if status == _OK else broken)
        if status == _OK and self._last is not None:
            timings = self._last.timings
            self._metrics.answered(
                total_seconds=now - self.arrival,
                queue_seconds=timings.queue,
                adapter_seconds=timings.adapter_load if self.adapters else None,
            )
        if log.isEnabledFor(logging.INFO):
            log.info("request", extra=fields(**self._fields(status, reason, now)))

    def _outcome(self, error: BaseException | None, now: float) -> tuple[str, str]:
        """The gRPC status, and the reason in a word."""
        if error is None and self._last is not None:
            return _OK, self._last.reason.value
        if isinstance(error, LoramuxError) and not isinstance(error, StartupError):
            return error.status, error.reason
        if error is not None and not isinstance(error, asyncio.CancelledError):
            return EngineFault.status, EngineFault.reason
        if self.deadline is not None and now >= self.deadline - min(_HANGS_UP, (self.deadline - self.arrival) / 4):
            return DeadlineExceeded.status, DeadlineExceeded.reason
        return Cancelled.status, Cancelled.reason

    def _fields(self, status: str, reason: str, now: float) -> dict[str, object]:
        found: dict[str, object] = {"id": self._request_id, "status": status, "reason": reason}
        if self.adapters:
            found["adapters"] = self._names()
            found["uids"] = tuple(use.handle.uid for use in self.adapters)
        elif self._asked:
            found["asked"] = self._asked
        if self.request is not None:
            found["prompt_tokens"] = len(self.request.prompt_ids)
        progress = self.request.progress if self.request is not None and self.taken else None
        if progress is not None:
            found["cached_tokens"] = progress.cached_tokens
        found["output_tokens"] = self._output_tokens
        if progress is not None:
            timings = progress.timings(self.arrival, now)
            found |= {f"{name}_seconds": seconds for name, seconds in asdict(timings).items()}
        if self._first is not None:
            found["first_token_seconds"] = self._first - self.arrival
        return found | {"total_seconds": now - self.arrival}

    def _names(self) -> tuple[str, ...]:
        return tuple(use.handle.name for use in self.adapters)


class Telemetry:
    """Made on the event loop; `snapshot` may then be called from any other thread."""

    def __init__(
        self, metrics: Metrics, engine: EngineClient, adapters: AdapterRegistry, *, patience: float = 0.5
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._engine = engine
        self._adapters = adapters
        self._patience = patience
        self._latest = self._take()
        self._stop_listening = adapters.listen(self._adapter_changed)
        adapters.loaded = lambda entry: metrics.adapter_loaded(entry.load_seconds)
        metrics.set_source(self.snapshot)
        metrics.set_known(lambda name: adapters.find(name) is not None)

    def close(self) -> None:
        """The figures stay as they are."""
        self._stop_listening()
        latest = self._take()
        self._metrics.set_source(lambda: latest)

    def snapshot(self) -> Snapshot:
        """The figures of now. Not to be called on the loop's own thread."""
        taken: concurrent.futures.Future[Snapshot] = concurrent.futures.Future()

        def take() -> None:
            if taken.set_running_or_notify_cancel():
                try:
                    taken.set_result(self._take())
                except Exception as error:
                    taken.set_exception(error)

        self._loop.call_soon_threadsafe(take)
        try:
            self._latest = taken.result(self._patience)
        except TimeoutError:
            taken.cancel()
        return self._latest

    def _take(self) -> Snapshot:
        engine = self._engine.stats()
        settings = self._engine.limits.settings
        entries, tiers = self._adapters.entries(), self._adapters.tiers
        return Snapshot(
            running=engine.running,
            waiting=engine.waiting,
            kv_blocks_used=engine.kv_blocks_used,
            kv_blocks_total=engine.kv_blocks_total,
            block_size=settings.block_size,
            healthy=self._engine.healthy,
            running_adapters=_named(engine.running_adapters),
            waiting_adapters=_named(engine.waiting_adapters),
            max_adapters_at_once=settings.max_batch_rows,
            prefix_query_tokens=engine.prefix_query_tokens,
            prefix_hit_tokens=engine.prefix_hit_tokens,
            preemptions=engine.preemptions,
            faults=engine.faults,
            steps=engine.steps,
            late_compilations=engine.late_compilations,
            step_seconds=asdict(engine.step_seconds),
            adapter_states=Counter(entry.state.value for entry in entries),
            adapter_residencies=Counter(entry.residency.value for entry in entries),
            adapter_lookups={place.value: count for place, count in tiers.lookups.items()},
            adapter_evictions=tiers.evictions,
            adapter_bytes=tiers.device.used,
            adapter_budget_bytes=tiers.device.limit or 0,
            adapter_host_bytes=tiers.host.used,
            adapter_host_budget_bytes=tiers.host.limit or 0,
            waiting_for_adapters=tiers.waiting,
            adapter_leases=sum(len(entry.leases) for entry in entries),
        )

    def _adapter_changed(self, entry: AdapterEntry) -> None:
        if entry.state is State.FAILED and entry.error is not None:
            self._metrics.adapter_failed(entry.error.metadata.get("cause", entry.error.reason))
        elif entry.state is State.UNLOADED:
            self._metrics.adapter_unloaded()
            if self._adapters.find(entry.name) is None:
                self._metrics.forget_adapter(entry.name)


def _named(adapters: Iterable[str]) -> tuple[str, ...]:
    """Sorted, without the base (whose name is empty)."""
    return tuple(sorted(name for name in adapters if name))

"""Connects the metrics with the engine, the adapter registry and the requests that pass.

The registry belongs to the event loop's thread and scrapes come on another: `Telemetry.snapshot` therefore takes
its figures on the loop and waits for them, at most `patience` seconds; a loop that is that busy gives the last ones.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from loramux.engine.client import EngineClient
from loramux.engine.request import Delta, Request, SequenceFinished
from loramux.lora.entry import AdapterEntry, State
from loramux.lora.registry import AdapterRegistry
from loramux.metrics import Metrics, Snapshot


class RequestWatch:
    """Sees the events of one request go by and reports what they say of its speed."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics = metrics
        self._request = request
        self._first = 0.0
        self._latest: dict[int, float] = {}

    def see(self, event: Delta | SequenceFinished) -> None:
        """Called with every event, when it is delivered."""
        now = time.monotonic()
        if isinstance(event, Delta):
            if not event.token_ids:
                return
            before = self._latest.get(event.index)
            if before is None:
                self._first = self._first or now
            else:
                self._metrics.token_gap((now - before) / len(event.token_ids))
            self._latest[event.index] = now
        elif event.last:
            arrival = self._request.arrival
            self._metrics.finished(
                adapters=tuple(use.handle.name for use in self._request.adapters),
                reason=event.reason.value,
                prompt_tokens=event.usage.prompt_tokens,
                generated_tokens=event.usage.completion_tokens,
                first_token_seconds=(self._first or now) - arrival,
                total_seconds=now - arrival,
                queue_seconds=event.timings.queue,
                adapter_seconds=event.timings.adapter_load,
            )


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

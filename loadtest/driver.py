"""Sends planned requests at a server from one asyncio loop and notes when each token came.

Closed loop: a fixed number of requests is in flight; the next is sent when one ends. Open loop: each request
is sent at its planned time whatever the server does, and its latency counts from that time, so neither a
slow server nor a late driver can hide a wait (no coordinated omission).

Knows no wire: a `StreamOpener` turns a request into token counts as they arrive. It watches itself, too: a
heartbeat measures how late the loop runs its timers, and a run whose `lag_ms_p99` is not small measured the
driver.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from loramux.errors import LoramuxError

from loadtest.report import RequestRecord, percentile
from loadtest.workload import PlannedRequest

HEARTBEAT = 0.01

StreamOpener = Callable[[PlannedRequest], AsyncIterator[int]]
"""Sends a request and yields the number of new tokens of each message as it arrives."""


@dataclass(frozen=True, slots=True)
class DriveResult:
    """A finished run. `duration` is in seconds, from the first request's start to the last one's end.

    `lag_ms_p99` is how late the driver's own loop was; `cpu_fraction` is the part of one core that it used.
    """

    records: list[RequestRecord]
    duration: float
    lag_ms_p99: float
    cpu_fraction: float


async def drive(
    open_stream: StreamOpener,
    plan: Sequence[PlannedRequest],
    *,
    concurrency: int | None = None,
    exact_output: bool = True,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
    clock: Callable[[], float] = time.perf_counter,
) -> DriveResult:
    """Run a plan: `concurrency` requests at a time, or (None) each at its planned arrival, by `clock` in seconds.

    With `exact_output`, a stream that ends well with another number of tokens than planned counts as failed.
    Failures of requests are recorded, never raised.
    """
    records: list[RequestRecord] = []

    async def run_one(request: PlannedRequest, start: float) -> None:
        record = RequestRecord(request.adapter, len(request.prompt_ids), start)
        records.append(record)
        try:
            async for tokens in open_stream(request):
                if tokens:
                    record.deltas.append((clock(), tokens))
        except Exception as error:
            record.error = status_of(error)
        else:
            record.error = defect_of(record, request.output_len if exact_output else None)
        record.end = clock()
        on_done(record)

    async def closed_loop(queue: list[PlannedRequest]) -> None:
        while queue:
            await run_one(queue.pop(), clock())

    async def open_loop(request: PlannedRequest, start: float) -> None:
        await asyncio.sleep(start - clock())
        await run_one(request, start)

    lags: list[float] = []
    heartbeat = asyncio.create_task(watch_lag(lags, clock))
    begin, begin_cpu = clock(), time.process_time()
    try:
        async with asyncio.TaskGroup() as tasks:
            if concurrency is None:
                for request in plan:
                    tasks.create_task(open_loop(request, begin + request.arrival))
            else:
                queue = list(reversed(plan))
                for _ in range(min(concurrency, len(plan))):
                    tasks.create_task(closed_loop(queue))
    finally:
        heartbeat.cancel()
        with suppress(asyncio.CancelledError):
            await heartbeat
    duration = max((record.end for record in records), default=begin) - begin
    cpu = (time.process_time() - begin_cpu) / max(duration, 1e-9)
    return DriveResult(records, duration, percentile(lags, 99) * 1000.0, cpu)


async def watch_lag(lags: list[float], clock: Callable[[], float]) -> None:
    """Append to `lags`, every HEARTBEAT seconds until cancelled, how many seconds late the loop woke us."""
    while True:
        due = clock() + HEARTBEAT
        try:
            await asyncio.sleep(HEARTBEAT)
        finally:  # a stall that the run ended in counts as well
            lags.append(max(0.0, clock() - due))


def status_of(error: Exception) -> str:
    """Return the gRPC status name of a failed call; the class name of anything that has none."""
    if isinstance(error, LoramuxError):
        return error.status
    code = getattr(error, "code", None)  # grpc.RpcError has one; importing grpc for its sake is not worth it
    return str(code().name) if callable(code) else type(error).__name__


def defect_of(record: RequestRecord, output_len: int | None) -> str:
    """Return what is wrong with a stream that ended with OK; "" if nothing is."""
    if not record.deltas:
        return "OK_WITHOUT_TOKENS"
    if output_len is not None and record.output_tokens != output_len:
        return "OK_WITH_WRONG_LENGTH"
    return ""

"""Loads and unloads adapters by the thousand under traffic, and judges what is left behind.

Three things go on at once: *churn* (a few workers, each loading an adapter under a name of its own, using
it, now and then replacing it while it is in use, and unloading it while its request still runs), *traffic*
(requests on the base and on resident adapters, some of them cancelled by the client half-way) and *sampling*
of the server's memory.

No request may fail. So that none fails by the soak's own doing, an adapter is unloaded only after the server
has said `started` for every request that names it: the request holds its lease then, and unloading has to
wait for it.

Judged at the end: failures; answers from another adapter than the one asked for; resident memory (see
`trend`); and that every count is back where it was before the first load.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loadtest.driver import status_of
from loadtest.target import Target
from loadtest.trend import MIB
from loadtest.verdict import Sample, SoakLog, verdict
from loadtest.watch import RESIDENT_METRIC, resident_bytes, scrape

MAX_FAILURES = 100
NAN = float("nan")
SAMPLES = 200
MIN_SAMPLE_CYCLES = 4  # a run of a few cycles stays too short to be judged
COUNTED_METRICS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "loramux_adapter_leases",
    "loramux_adapter_bytes",
)


@dataclass(frozen=True, slots=True)
class SoakSpec:
    """How hard and how long. One cycle is one load and one unload; a replacement is one more of each.

    Memory is sampled every `cycles / SAMPLES` cycles, so that a fast run can be judged as well as a slow one, and every
    `sample_interval` seconds, so that a server that stands still is watched too.
    """

    cycles: int = 10_000
    churn: int = 6
    concurrency: int = 6
    residents: int = 3
    request_every: int = 8
    replace_every: int = 16
    cancel_every: int = 16
    prompt_len: int = 16
    output_len: int = 8
    sample_interval: float = 0.5
    max_growth: int = 1 << 30
    settle_timeout: float = 15.0
    seed: int = 0


class Soak:
    """One soak of one server. `run` may be awaited once.

    `variants` are folders of different adapters that the server may read; `metrics` is the URL of its
    metrics page; `pid` its process on this machine (None: its memory is read from the metrics page).
    """

    def __init__(
        self, target: Target, spec: SoakSpec, variants: Sequence[Path], metrics: str, pid: int | None = None
    ) -> None:
        if len(variants) < 2:
            raise ValueError("the soak needs at least two different adapters to tell one load from the next")
        self.target = target
        self.spec = spec
        self.variants = [str(folder.resolve()) for folder in variants]
        self.metrics = metrics
        self.pid = pid
        self.log = SoakLog()
        self.vocab_size = 0
        self._todo = iter(range(spec.cycles))
        self._sample_every = max(MIN_SAMPLE_CYCLES, spec.cycles // SAMPLES)
        self._stopping = asyncio.Event()

    async def run(self, on_sample: Callable[[SoakLog], None] = lambda log: None) -> dict[str, Any]:
        """Run to the end and return what `verdict` says, ready for JSON.

        Raises what the client raises when the server cannot be reached at all.
        """
        begin = time.perf_counter()
        self.vocab_size = await self.target.vocab_size()
        await self._use("", "", random.Random(self.spec.seed))
        before = await self.settled_counts(None)
        residents = {f"soak-r{i}": await self._load(f"soak-r{i}", i) for i in range(self.spec.residents)}
        side = [asyncio.create_task(self._traffic(i, {"": "", **residents})) for i in range(self.spec.concurrency)]
        take_sample = partial(self._take_sample, begin, on_sample)
        side.append(asyncio.create_task(self._sample(take_sample)))
        try:
            async with asyncio.TaskGroup() as churn:
                for i in range(self.spec.churn):
                    churn.create_task(self._churn(i, take_sample))
        finally:
            self._stopping.set()
            await asyncio.gather(*side)
        churned = time.perf_counter() - begin
        try:
            for name in residents:
                await self._unload(name)
            after = await self.settled_counts(before)
        except Exception as error:  # a server that died is a verdict, not a traceback
            self._fail("clean-up", status_of(error))
            after = dict.fromkeys(before, NAN)
        return verdict(self.log, before, after, churned)

    async def counts(self) -> dict[str, float]:
        """Return everything that has to come back to where it was: adapters, leases, bytes, queue, KV cache."""
        page = await scrape(self.metrics)
        listed = await self.target.adapters()
        return {
            "adapters": len(listed.adapters),
            "adapter_bytes": listed.device_bytes,
            "leases": sum(adapter.leases for adapter in listed.adapters),
            **{name: page.get(name, NAN) for name in COUNTED_METRICS},
        }

    async def settled_counts(self, wanted: dict[str, float] | None) -> dict[str, float]:
        """Return the counts, once they equal `wanted` (None: once they stand still) or time is up."""
        deadline = time.monotonic() + self.spec.settle_timeout
        last = await self.counts()
        while time.monotonic() < deadline:
            if wanted is not None and last == wanted:
                break
            await asyncio.sleep(0.25)
            current = await self.counts()
            if wanted is None and current == last:
                break
            last = current
        return last

    async def _churn(self, worker: int, take_sample: Callable[[], Awaitable[None]]) -> None:
        rng = random.Random(f"churn {self.spec.seed} {worker}")
        name = f"soak-c{worker}"
        for cycle in self._todo:
            if self._stopping.is_set():
                return
            try:
                await self._cycle(name, cycle, rng)
            except Exception as error:
                self._fail("cycle", status_of(error))
            self.log.cycles += 1
            if self.log.cycles % self._sample_every == 0:
                await take_sample()

    async def _cycle(self, name: str, cycle: int, rng: random.Random) -> None:
        uid = await self._load(name, cycle)
        if cycle % self.spec.request_every:
            await self._unload(name)
            return
        started = asyncio.Event()
        use = asyncio.create_task(self._use(name, uid, rng, started))
        await started.wait()
        try:
            if cycle % self.spec.replace_every == 0:
                await self._load(name, cycle + 1)
            self.log.unloads_in_use += not use.done()
            await self._unload(name)
        finally:
            await use

    async def _load(self, name: str, variant: int) -> str:
        begin = time.perf_counter()
        uid = await self.target.load(name, self.variants[variant % len(self.variants)])
        self.log.load_seconds.append(time.perf_counter() - begin)
        self.log.loads += 1
        return uid

    async def _unload(self, name: str) -> None:
        begin = time.perf_counter()
        await self.target.unload(name)
        self.log.unload_seconds.append(time.perf_counter() - begin)
        self.log.unloads += 1

    async def _traffic(self, worker: int, uids: dict[str, str]) -> None:
        rng = random.Random(f"traffic {self.spec.seed} {worker}")
        names = list(uids)
        while not self._stopping.is_set():
            name = rng.choice(names)
            cancel = rng.randrange(self.spec.cancel_every) == 0
            await self._use(name, uids[name], rng, cancel=cancel)

    async def _use(
        self,
        name: str,
        uid: str,
        rng: random.Random,
        started: asyncio.Event | None = None,
        *,
        cancel: bool = False,
    ) -> None:
        """Send one request and check who answers. `started` is set once it holds its lease, or has failed."""
        prompt = [rng.randrange(self.vocab_size) for _ in range(rng.randint(1, self.spec.prompt_len))]
        tokens = 0
        stream = self.target.stream(prompt, name, self.spec.output_len)
        try:
            async for event in stream:
                if event.uid is not None:
                    if event.uid != uid:
                        self._fail("request", "WRONG_ADAPTER")
                    if started is not None:
                        started.set()
                tokens += event.tokens
                if cancel and tokens:
                    self.log.cancelled += 1
                    return
            if tokens == self.spec.output_len:
                self.log.completed += 1
            else:
                self._fail("request", "OK_WITH_WRONG_LENGTH")
        except Exception as error:
            self._fail("request", status_of(error))
        finally:
            await stream.aclose()
            if started is not None:
                started.set()

    async def _sample(self, take_sample: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping.is_set():
            await take_sample()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self.spec.sample_interval)

    async def _take_sample(self, begin: float, on_sample: Callable[[SoakLog], None]) -> None:
        try:
            resident = await self._resident()
        except OSError as error:
            self._stop(f"the server's memory cannot be read any more: {error}")
            return
        self.log.samples.append(Sample(time.perf_counter() - begin, self.log.cycles, resident))
        on_sample(self.log)
        if resident - self.log.samples[0].resident > self.spec.max_growth:
            self._stop(f"stopped early: the server grew by more than {self.spec.max_growth / MIB:,.0f} MiB")

    async def _resident(self) -> int:
        if self.pid is not None:
            return resident_bytes(self.pid)
        page = await scrape(self.metrics)
        if RESIDENT_METRIC not in page:
            raise OSError(f"{self.metrics} has no {RESIDENT_METRIC}; give --pid")
        return int(page[RESIDENT_METRIC])

    def _fail(self, what: str, status: str) -> None:
        self.log.failures[f"{what}: {status}"] += 1
        if self.log.failed >= MAX_FAILURES:
            self._stop(f"stopped early after {MAX_FAILURES} failures")

    def _stop(self, why: str) -> None:
        self.log.stopped_early = self.log.stopped_early or why
        self._stopping.set()

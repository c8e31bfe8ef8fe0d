"""Does a stream notice that operators load, replace and unload adapters? Gaps between tokens, with and without.

Closed loop: every stream sends its next request when one ends, without end, on an adapter of its own that stays on the
device. Windows without operations and windows with them take turns. Gaps are measured here, at the client, from one
message that carries tokens to the next. A gap that begins or ends in a window with operations counts as one of those.

Prints nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from loadtest.driver import status_of
from loadtest.report import percentile
from loadtest.target import Target

OPERATION_INTERVAL = 1.0  # load, replace, unload in turn: 20 of each a minute


@dataclass(frozen=True, slots=True)
class SwapSpec:
    """`seconds` of each kind of window, cut into `windows` of each."""

    seconds: float = 60.0
    windows: int = 4
    streams: int = 16
    prompt_len: int = 64
    output_len: int = 64
    interval: float = OPERATION_INTERVAL
    seed: int = 0


@dataclass(slots=True)
class SwapLog:
    """What happened. Gaps are in seconds; `failures` counts "what: STATUS"."""

    quiet_gaps: list[float] = field(default_factory=list)
    busy_gaps: list[float] = field(default_factory=list)
    busy_seconds: float = 0.0
    completed: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Percentiles in ms, counts, operations a minute; ready for JSON. The ratio is 0 if a kind has no gap."""
        quiet, busy = percentile(self.quiet_gaps, 99), percentile(self.busy_gaps, 99)
        return {
            "itl_p99_ratio": busy / quiet if quiet else 0.0,
            "quiet_p50_itl_ms": 1000.0 * percentile(self.quiet_gaps, 50),
            "quiet_p99_itl_ms": 1000.0 * quiet,
            "quiet_max_itl_ms": 1000.0 * percentile(self.quiet_gaps, 100),
            "quiet_gaps": len(self.quiet_gaps),
            "busy_p50_itl_ms": 1000.0 * percentile(self.busy_gaps, 50),
            "busy_p99_itl_ms": 1000.0 * busy,
            "busy_max_itl_ms": 1000.0 * percentile(self.busy_gaps, 100),
            "busy_gaps": len(self.busy_gaps),
            "completed": self.completed,
            "failed": self.failures.total(),
            "errors": dict(self.failures),
            "per_minute": {
                kind: round(60.0 * n / max(self.busy_seconds, 1e-9), 1) for kind, n in self.operations.items()
            },
        }


class HotSwap:
    """One measurement of one server. `run` may be awaited once.

    `variants` are folders of different adapters under a root of the server. Those of one rank stand `ranks` apart, so
    that a replacement changes the content and not the work. `clock` tells when tokens come, in seconds. Raises
    ValueError if there are not two of each rank.
    """

    def __init__(
        self,
        target: Target,
        spec: SwapSpec,
        variants: Sequence[Path],
        ranks: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if len(variants) < 2 * ranks:
            raise ValueError(f"{ranks} ranks need {2 * ranks} different adapters to replace one by another, or more")
        self.target = target
        self.spec = spec
        self.log = SwapLog()
        self._clock = clock
        self._variants = [[str(folder.resolve()) for folder in variants[i::ranks]] for i in range(ranks)]
        self._versions: Counter[int] = Counter()  # by stream
        self._busy: bool | None = None  # None: gaps do not count
        self._stopping = False
        self._warm = asyncio.Semaphore(0)
        self._operations = self._turns()
        self._operated = 0
        self._vocab_size = 0

    async def run(self, on_window: Callable[[SwapLog], None] = lambda log: None) -> SwapLog:
        """Run all windows. Raises what the client raises when the streams' adapters cannot be loaded at all.

        What fails later is counted.
        """
        self._vocab_size = await self.target.vocab_size()
        for i in range(self.spec.streams):
            await self.target.load(_stream_name(i), self._source(i, 0))
        length = self.spec.seconds / self.spec.windows
        async with asyncio.TaskGroup() as streams:
            for i in range(self.spec.streams):
                streams.create_task(self._stream(i))
            try:
                for _ in range(self.spec.streams):
                    await self._warm.acquire()
                for window in range(self.spec.windows):
                    self._busy = False
                    await asyncio.sleep(length)
                    on_window(self.log)
                    self._busy = True
                    await self._operate(window, length)
                    on_window(self.log)
                self._busy = None
            finally:
                self._stopping = True
        return self.log

    def _turns(self) -> Iterator[tuple[str, Callable[[], Awaitable[Any]]]]:
        """Operations without end. Every other replacement is of a stream's own adapter."""
        for cycle in count():
            name, index = f"swap-other-{cycle}", self.spec.streams + cycle
            yield "load", partial(self.target.load, name, self._source(index, 0))
            if cycle % 2:
                stream = cycle // 2 % self.spec.streams
                self._versions[stream] += 1
                replaced = _stream_name(stream), self._source(stream, self._versions[stream])
            else:
                replaced = name, self._source(index, 1)
            yield "replace", partial(self.target.load, *replaced)
            yield "unload", partial(self.target.unload, name)

    def _source(self, index: int, version: int) -> str:
        same_rank = self._variants[index % len(self._variants)]
        return same_rank[(index // len(self._variants) + version) % len(same_rank)]

    async def _stream(self, index: int) -> None:
        rng = random.Random(f"stream {self.spec.seed} {index}")
        # The first answers have different lengths, lest all streams begin and end together ever after.
        await self._request(index, rng, 1 + index * self.spec.output_len // self.spec.streams)
        self._warm.release()
        while not self._stopping:
            await self._request(index, rng, self.spec.output_len)

    async def _request(self, index: int, rng: random.Random, output_len: int) -> None:
        prompt = [rng.randrange(self._vocab_size) for _ in range(self.spec.prompt_len)]
        tokens = 0
        last: tuple[float, bool | None] | None = None
        try:
            async for event in self.target.stream(prompt, _stream_name(index), output_len):
                if not event.tokens:
                    continue
                now, busy = self._clock(), self._busy
                if last is not None and busy is not None and last[1] is not None:
                    (self.log.busy_gaps if busy or last[1] else self.log.quiet_gaps).append(now - last[0])
                last = now, busy
                tokens += event.tokens
        except Exception as error:
            self.log.failures[f"request: {status_of(error)}"] += 1
            await asyncio.sleep(0.1)  # a server that refuses everything at once must not spin the loop
            return
        if tokens == output_len:
            self.log.completed += 1
        else:
            self.log.failures["request: OK_WITH_WRONG_LENGTH"] += 1

    async def _operate(self, window: int, seconds: float) -> None:
        """Operations one by one, one due every interval of all windows' time; one that is late is caught up with."""
        begin = time.perf_counter()
        while (due := self._operated * self.spec.interval) < (window + 1) * seconds:
            await asyncio.sleep(begin + due - window * seconds - time.perf_counter())
            self._operated += 1
            kind, operation = next(self._operations)
            try:
                await operation()
                self.log.operations[kind] += 1
            except Exception as error:
                self.log.failures[f"{kind}: {status_of(error)}"] += 1
        await asyncio.sleep(begin + seconds - time.perf_counter())
        self.log.busy_seconds += time.perf_counter() - begin


def _stream_name(index: int) -> str:
    return f"swap-stream-{index:02d}"

"""Any order of requests, disconnects, deadlines, faults, loads, replacements, pins and unloads, through the wire: every
unload ends and reports the bytes that it freed, and all that was taken comes back.

The model and the reader wait at gates that only rules open, so requests are met in every phase: in the engine's inbox,
in the queue, waiting for their adapters, in a prompt of several steps, decoding, with some of n sequences done.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import weakref
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from loramux.answers import Delta, Finished, Unloaded
from loramux.engine.settings import EngineSettings
from loramux.errors import (
    AdapterNotFound,
    AdapterUnavailable,
    Cancelled,
    DeadlineExceeded,
    EngineFault,
    LoramuxError,
    Overloaded,
)
from loramux.lora.entry import AdapterEntry, Residency, State
from loramux.lora.folder import AdapterFolder
from loramux.lora.roots import WEIGHTS_FILE

from tests.patience import PATIENCE
from tests.rpc.gates import GatedModel, GatedReader
from tests.rpc.stack import Running, running, write_adapter

SIZES = {"a": 10, "b": 20, "c": 30}
VERSIONS = 3  # version v of an adapter has v more bytes than its first
DEVICE, HOST = 45, 25  # a and b or a and c fit together, b and c never do
TARGETS: dict[str, dict[str, Any]] = {
    "base": {},
    "a": {"adapter": "a"},
    "b": {"adapter": "b"},
    "c": {"adapter": "c"},
    "bad": {"adapter": "bad"},
    "a and b": {"mix": {"a": 1.0, "b": 0.5}},
    "a and c": {"mix": {"a": 1.0, "c": 0.5}},
    "b and c": {"mix": {"b": 1.0, "c": 0.5}},
}
NAMES = st.sampled_from(sorted(SIZES))
SECONDS = st.sampled_from([None, 0.0, 0.01])
SETTINGS = EngineSettings(block_size=4, max_batch_rows=4, max_batch_tokens=8)


class CountingReader(GatedReader):
    """Keeps weak references to all that it gave: what is still alive still takes memory, whatever books say."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[weakref.ref[Any]] = []

    def __call__(self, folder: AdapterFolder) -> Any:
        loaded = super().__call__(folder)
        self.given.append(weakref.ref(loaded))
        return loaded

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.given)


@dataclass(eq=False)
class Asked:
    """A request under way; `task` gives what ended it: an error, or None."""

    task: asyncio.Task[LoramuxError | None]
    may_be: tuple[type[LoramuxError], ...]


class Books:
    """What each adapter took on the device when it went, told by its file's size and where it was last seen."""

    def __init__(self, r: Running) -> None:
        self.freed: dict[str, int] = {}
        self._last: dict[str, Residency] = {}
        r.registry.listen(self._see)

    def _see(self, entry: AdapterEntry) -> None:
        if entry.state is State.UNLOADED:
            on_device = self._last.get(entry.uid) is Residency.DEVICE
            self.freed[entry.uid] = (Path(entry.source) / WEIGHTS_FILE).stat().st_size if on_device else 0
        self._last[entry.uid] = entry.residency


class UnloadMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        for name, size in SIZES.items():
            write_adapter(root, name, name.encode() * size)
            for version in range(VERSIONS):
                write_adapter(root / "versions", f"{name}{version}", name.encode() * (size + version))
        write_adapter(root, "bad", b"bad" + b"x" * 10)
        self.model = GatedModel(num_kv_blocks=24)
        self.reader = CountingReader()
        self.serial = 0
        self.asked: list[Asked] = []
        self.loads: list[asyncio.Task[Any]] = []
        self.unloads: list[asyncio.Task[Unloaded | LoramuxError]] = []
        self.there = set(SIZES)  # what has not been unloaded since it was loaded last
        self.gone = "nobody"  # what was unloaded last
        self.faulty = False
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.run(self.start())

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        async def in_time() -> None:
            async with asyncio.timeout(PATIENCE):
                await work

        self.runner.run(in_time())

    async def start(self) -> None:
        server = running(
            Path(self.folder.name),
            engine_settings=SETTINGS,
            model=self.model,
            read=self.reader,
            scan_interval=0.0,
            budget=DEVICE,
            host_budget=HOST,
        )
        self.r = await self.stack.enter_async_context(server)
        self.books = Books(self.r)
        self.model.gate.close()

    async def until(self, done: Callable[[], object]) -> None:
        while not done():
            await asyncio.sleep(0.0005)

    def quiet(self) -> bool:
        """The engine has seen all that was handed to it up to its last step, and stands at the gate or has no work."""
        stats, streams = self.r.engine.stats(), self.r.engine._streams
        return bool(self.model.gate.waiting) or (stats.running == 0 and stats.waiting == len(streams))

    # Requests.

    @rule(
        who=st.sampled_from(sorted(TARGETS)),
        prompt=st.sampled_from(["", "x" * 20]),
        tokens=st.integers(1, 6),
        n=st.integers(1, 3),
        streamed=st.booleans(),
        seconds=st.sampled_from([None, None, None, 0.03]),
    )
    def ask(self, who: str, prompt: str, tokens: int, n: int, streamed: bool, seconds: float | None) -> None:
        self.serial += 1
        may_be: list[type[LoramuxError]] = [EngineFault]  # if one was seeded
        if seconds is not None:
            may_be.append(DeadlineExceeded)
        if who != "base":  # unloaded, broken, or too large for what is pinned, now or when an operator loaded it
            may_be += [AdapterNotFound, Cancelled, Overloaded, AdapterUnavailable]
        prompt = f"{self.serial:04}{prompt}"
        request = {"max_new_tokens": tokens, "ignore_eos": True, "n": n, "temperature": 1.0, **TARGETS[who]}

        async def answer() -> LoramuxError | None:
            counts = [0] * n
            try:
                if streamed:
                    ended = 0
                    async with aclosing(self.r.client.stream(prompt, timeout=seconds, **request)) as events:
                        async for event in events:
                            if isinstance(event, Delta):
                                counts[event.index] += len(event.token_ids)
                            ended += isinstance(event, Finished)
                    assert ended == n
                else:
                    result = await self.r.client.generate(prompt, timeout=seconds, **request)
                    counts = [len(completion.token_ids) for completion in result.completions]
            except LoramuxError as error:
                return error
            assert counts == [tokens] * n
            return None

        async def go() -> None:
            task = asyncio.create_task(answer())
            self.asked.append(Asked(task, tuple(may_be)))
            ids = tuple(prompt.encode())
            await self.until(lambda: task.done() or any(s.prompt_ids == ids for s in self.r.engine._streams))
            await self.until(self.quiet)

        self.run(go())

    @rule(steps=st.integers(1, 5))
    def advance(self, steps: int) -> None:
        async def go() -> None:
            for _ in range(steps):
                await self.until(self.quiet)
                if not self.model.gate.waiting:
                    return
                await self.one_step()

        self.run(go())

    async def one_step(self) -> None:
        """Until it has ended, or has failed and the model runs again on account of that."""
        gate, passed, before = self.model.gate, self.model.gate.passed, self.ended_steps()
        gate.let_one_pass()
        await self.until(lambda: self.ended_steps() > before or (gate.passed > passed and gate.waiting > 0))

    def ended_steps(self) -> int:
        stats = self.r.engine.stats()
        return stats.steps + stats.faults

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        asked = self.asked.pop(data.draw(st.integers(max(0, len(self.asked) - 4), len(self.asked) - 1)))

        async def go() -> None:
            asked.task.cancel()
            await asyncio.wait([asked.task])

        self.run(go())

    @rule()
    def let_deadlines_pass(self) -> None:
        async def go() -> None:
            for asked in self.asked:
                if DeadlineExceeded in asked.may_be:
                    await asyncio.wait([asked.task])

        self.run(go())

    @rule(token=st.one_of(st.none(), st.integers(0, 255)))
    def fault(self, token: int | None) -> None:
        """The next step fails for all that are in it; or the requests with a sequence that comes upon `token` do."""
        if token is None:
            self.model.fail_steps = 1
        else:
            self.model.poison = token
        self.faulty = True

    # Operators.

    @rule(stop=st.booleans())
    def stop_the_reader_or_let_it_go(self, stop: bool) -> None:
        async def go() -> None:
            self.reader.gate.open()
            if self.loads:
                await asyncio.wait(self.loads)

        if stop:
            self.reader.gate.close()
        else:
            self.run(go())

    @rule(name=NAMES, version=st.integers(0, VERSIONS - 1), pin=st.booleans())
    def load(self, name: str, version: int, pin: bool) -> None:
        """A first load, or a replacement."""

        async def load() -> None:
            with suppress(Overloaded, Cancelled):  # no room, or unloaded meanwhile
                await self.r.admin.load(name, f"versions/{name}{version}", replace=True, pin=pin)

        async def go() -> None:
            task = asyncio.create_task(load())
            self.loads.append(task)
            await self.until(lambda: task.done() or self.reader.gate.waiting)

        self.there.add(name)
        self.run(go())

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        async def go() -> None:
            with suppress(AdapterNotFound):
                await self.r.admin.pin(name, pinned)

        self.run(go())

    @precondition(lambda self: self.there)
    @rule(data=st.data(), seconds=SECONDS, cancel=st.booleans())
    def unload(self, data: st.DataObject, seconds: float | None, cancel: bool) -> None:
        self.gone = data.draw(st.sampled_from(sorted(self.there)))
        self.there.discard(self.gone)
        self.run(self.begin_unload(self.gone, seconds, cancel))

    @rule(seconds=SECONDS, cancel=st.booleans())
    def unload_again(self, seconds: float | None, cancel: bool) -> None:
        """Joins the drain, if it goes on."""
        self.run(self.begin_unload(self.gone, seconds, cancel))

    async def begin_unload(self, name: str, seconds: float | None, cancel: bool) -> None:
        """The call returns as soon as the name is gone; the drain goes on in a task of its own."""
        registry = self.r.registry
        current = registry.find(name)
        entries = [current] if current is not None else registry.draining(name)

        async def unload() -> Unloaded | LoramuxError:
            try:
                done = await self.r.admin.unload(name, drain_timeout=seconds, cancel_after_timeout=cancel)
            except LoramuxError as error:
                if isinstance(error, DeadlineExceeded):
                    assert seconds is not None
                    assert not cancel
                else:  # a drain that is joined may end before the call arrives
                    assert isinstance(error, AdapterNotFound)
                    assert current is None
                return error
            freed = sum(self.books.freed[entry.uid] for entry in entries)
            assert done.freed_bytes == freed or (current is None and done.freed_bytes < freed)
            return done

        task = asyncio.create_task(unload())
        self.unloads.append(task)
        await self.until(lambda: task.done() or current is None or registry.find(name) is not current)

    @precondition(lambda self: self.unloads)
    @rule()
    def operator_goes_away(self) -> None:
        """Whoever asked for the last unload does not wait for it; the drain goes on."""
        self.unloads.pop().cancel()

    @invariant()
    def holds(self) -> None:
        self.r.registry.check()

    def teardown(self) -> None:
        try:
            self.run(self.end())
        finally:
            self.runner.run(self.stack.aclose())
            self.runner.close()
            self.folder.cleanup()

    def nothing_alive(self) -> bool:
        """A worker's thread may hold what it has handed over until it runs again, at its low priority."""
        if self.reader.alive():
            gc.collect()
        return self.reader.alive() == 0

    async def end(self) -> None:
        """Everything goes on; nobody waits for ever, and nothing is left."""
        self.model.gate.open()
        self.reader.gate.open()
        if self.loads:  # those of one name run one after another, and an unload ends only the first
            await asyncio.wait(self.loads)
        tasks = [asked.task for asked in self.asked]
        for name in (*SIZES, "bad"):
            await self.begin_unload(name, None, cancel=False)
        _, hanging = await asyncio.wait([*tasks, *self.unloads], timeout=PATIENCE / 2)
        assert not hanging, f"{hanging} among {self.r.registry.entries()}"
        for task in (*self.loads, *self.unloads):
            if not task.cancelled():
                task.result()
        for asked in self.asked:
            error = asked.task.result()
            assert error is None or isinstance(error, asked.may_be), error
            assert self.faulty or not isinstance(error, EngineFault), error
        tiers = self.r.registry.tiers
        streams = self.r.engine._streams  # of what was cancelled, the last word may still be under way
        await self.until(lambda: self.r.at_baseline() and not tiers.device.reserved and not streams)
        self.r.registry.check()
        assert self.r.registry.entries() == []
        assert (tiers.device.used, tiers.host.used, tiers.waiting) == (0, 0, 0)
        stats = self.r.engine.stats()
        assert stats.kv_blocks_used == 0
        await self.until(self.nothing_alive)


UnloadMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_unload_machine = UnloadMachine.TestCase

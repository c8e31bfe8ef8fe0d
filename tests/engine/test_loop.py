"""The bridge to asyncio: readers that are slow, gone or late; drains; faults. Real thread, real event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from loramux.engine import engine as engine_module
from loramux.engine import sampler
from loramux.engine.batch import Batch
from loramux.engine.engine import Engine
from loramux.engine.loop import AsyncEngine
from loramux.engine.request import Delta, Event, Request, SequenceFinished
from loramux.engine.settings import EngineSettings
from loramux.errors import (
    AdapterUnavailable,
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineFault,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    SlowReader,
)
from loramux.model.inputs import ModelInputs
from torch import Tensor

from tests.patience import PATIENCE

from .fakes import FakeAdapter, FakeModel, adapter, byte_tokenizer, expected, request


class GatedModel(FakeModel):
    """Each forward takes a permit: tests decide how far the engine gets. `open` lets everything through."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        self.permits = threading.Semaphore(0)
        self.is_open = False

    def open(self) -> None:
        self.is_open = True
        self.permits.release()

    def forward(self, inputs: ModelInputs) -> Tensor:
        if not self.is_open:
            assert self.permits.acquire(timeout=PATIENCE)
        return super().forward(inputs)


class Server:
    """An AsyncEngine and the leases that it gives back."""

    def __init__(self, engine: AsyncEngine, model: GatedModel, finished: list[Request]) -> None:
        self.engine, self.model, self.finished = engine, model, finished

    async def answer(self, r: Request) -> list[int]:
        return [t async for e in self.engine.generate(r) if isinstance(e, Delta) for t in e.token_ids]

    async def failure(self, r: Request) -> LoramuxError:
        with pytest.raises(LoramuxError) as caught:
            await self.answer(r)
        return caught.value

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.005)

    async def assert_baseline(self, *requests: Request) -> None:
        await self.until(lambda: self.engine.stats().kv_blocks_used == 0 and len(self.finished) >= len(requests))
        stats = self.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert sorted(map(id, self.finished)) == sorted(map(id, requests)), "leases: once each"
        self.engine._engine.check_books()


@asynccontextmanager
async def serve(*, gated: bool = False, blocks: int = 64, **settings: Any) -> AsyncIterator[Server]:
    model = GatedModel(num_kv_blocks=blocks)
    if not gated:
        model.open()
    finished: list[Request] = []
    knobs = {"max_batch_rows": 4, "max_batch_tokens": 32} | settings
    engine = AsyncEngine(model, byte_tokenizer(), EngineSettings(**knobs), on_finish=finished.append)
    await engine.start()
    try:
        yield Server(engine, model, finished)
    finally:
        model.open()
        await engine.stop()


async def test_many_readers_get_their_own_answers() -> None:
    async with serve() as server:
        requests = [request([i, i + 1], adapter(f"a{i % 3}"), request_id=str(i)) for i in range(20)]
        answers = await asyncio.gather(*(server.answer(r) for r in requests))
        assert answers == [expected(r.prompt_ids, r.adapters) for r in requests]
        assert server.engine.healthy
        await server.assert_baseline(*requests)


async def test_lease_is_back_before_the_last_event() -> None:
    async with serve() as server:
        r = request([1])
        async for event in server.engine.generate(r):
            if isinstance(event, SequenceFinished):
                assert server.finished == [r]
                assert server.engine.stats().kv_blocks_used == 0
            else:
                last_delta = event
        assert isinstance(last_delta, Delta)


async def test_one_call_to_the_event_loop_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve() as server:
        loop = asyncio.get_running_loop()
        calls = 0
        plain = loop.call_soon_threadsafe

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
        await asyncio.gather(*(server.answer(request([i], max_new_tokens=20)) for i in range(4)))
        assert calls <= server.engine.stats().steps


async def test_slow_reader_gets_merged_deltas() -> None:
    async with serve() as server:
        r = request([1], n=2, max_new_tokens=20, logprobs=True)
        events = server.engine.generate(r)
        seen: list[Event] = [await anext(events)]
        await server.until(lambda: server.engine.stats().finished_requests == 1)
        await asyncio.sleep(0)
        seen += [event async for event in events]
        for index in range(2):
            deltas = [e for e in seen if isinstance(e, Delta) and e.index == index]
            assert len(deltas) <= 2, "what is not read yet becomes one delta"
            assert [t for d in deltas for t in d.token_ids] == expected([1], count=20)
            assert [p.token_id for d in deltas for p in d.logprobs] == expected([1], count=20)
        assert [e.last for e in seen if isinstance(e, SequenceFinished)] == [False, True]


async def test_reader_far_behind_loses_its_request_only() -> None:
    """One step at a time, so that the good reader is never behind by more than a token."""
    async with serve(gated=True, max_pending_tokens=10) as server:
        stuck, good = request([1], max_new_tokens=200), request([2], max_new_tokens=30)
        events, good_events = server.engine.generate(stuck), server.engine.generate(good)
        starts = [asyncio.create_task(anext(e)) for e in (events, good_events)]
        seen: list[Event] = []
        for _ in range(30):
            server.model.permits.release()
            await asyncio.wait(starts[:1])
            seen.append(await (starts[1] if not seen else anext(good_events)))
        assert isinstance(await anext(good_events), SequenceFinished)
        assert [t for e in seen if isinstance(e, Delta) for t in e.token_ids] == expected([2], count=30)
        with pytest.raises(SlowReader) as caught:
            [event async for event in events]
        assert caught.value.reason == "SLOW_READER"
        await good_events.aclose()
        await server.assert_baseline(stuck, good)


async def test_closing_the_generator_aborts() -> None:
    async with serve(gated=True) as server:
        r = request([1], max_new_tokens=200)
        events = server.engine.generate(r)
        server.model.permits.release()
        assert isinstance(await anext(events), Delta)
        await events.aclose()
        server.model.open()
        await server.assert_baseline(r)
        assert server.engine.stats().generated_tokens < 10


async def test_cancelled_reader_aborts_in_every_phase() -> None:
    async with serve(gated=True, max_batch_rows=1) as server:
        running, queued = request([1], max_new_tokens=200), request([2], max_new_tokens=200)
        slow = request([3], FakeAdapter("slow", "slow-1"))
        tasks = [asyncio.create_task(server.answer(r)) for r in (running, queued, slow)]
        server.model.permits.release()
        await server.until(lambda: server.engine.stats().running == 1)
        for task in tasks:
            task.cancel()
        assert {type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)} == {asyncio.CancelledError}
        server.model.open()
        await server.assert_baseline(running, queued, slow)


async def test_abort_by_request_id() -> None:
    async with serve(gated=True) as server:
        r = request([1], request_id="mine", max_new_tokens=200)
        task = asyncio.create_task(server.failure(r))
        await asyncio.sleep(0)
        error = Cancelled("unloaded")
        server.engine.abort("mine", error)
        server.engine.abort("unknown", error)
        server.model.open()
        assert await task is error
        await server.assert_baseline(r)


async def test_full_queue_refuses_with_retry() -> None:
    async with serve(gated=True, max_batch_rows=1, max_queue=2) as server:
        requests = [request([i]) for i in range(4)]
        tasks = [asyncio.create_task(server.answer(requests[0]))]
        server.model.permits.release()
        await server.until(lambda: server.engine.stats().running == 1)
        tasks += [asyncio.create_task(server.answer(r)) for r in requests[1:3]]
        await asyncio.sleep(0)
        error = await server.failure(requests[3])
        assert isinstance(error, Overloaded)
        assert error.reason == "QUEUE_FULL"
        assert error.retry_after > 0
        server.model.open()
        assert await asyncio.gather(*tasks) == [expected(r.prompt_ids) for r in requests[:3]]
        await server.assert_baseline(*requests)


async def test_bad_request_is_refused_at_the_door_and_its_lease_given_back() -> None:
    async with serve() as server:
        r = request([1], n=1000)
        assert isinstance(await server.failure(r), InvalidRequest)
        await server.assert_baseline(r)


async def test_a_defect_in_the_checks_keeps_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve() as server:
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "check", lambda engine, r: 1 / 0)
            bad = request([1])
            with pytest.raises(ZeroDivisionError):
                await server.answer(bad)
        good = request([2])
        assert await server.answer(good) == expected([2])
        await server.assert_baseline(bad, good)


async def test_request_that_can_never_fit_is_refused() -> None:
    async with serve(blocks=4) as server:
        assert server.engine.limits.max_context == 16
        assert isinstance(await server.failure(request(range(16))), InvalidRequest)
        assert len(await server.answer(request(range(15), max_new_tokens=50))) == 1


async def test_deadline_wakes_an_idle_engine() -> None:
    """All that there is waits for a load: nobody submits anything, and the deadline must be noticed all the same."""
    async with serve(load_poll_seconds=60.0) as server:
        loop = asyncio.get_running_loop()
        r = request([1], FakeAdapter("slow", "slow-1"), deadline=loop.time() + 0.05)
        assert isinstance(await asyncio.wait_for(server.failure(r), PATIENCE), DeadlineExceeded)
        await server.assert_baseline(r)


@pytest.mark.parametrize("announced", [True, False])
async def test_finished_load_wakes_the_engine(announced: bool) -> None:
    async with serve(load_poll_seconds=60.0 if announced else 0.02) as server:
        slow = FakeAdapter("slow", "slow-1")
        r = request([1], slow)
        task = asyncio.create_task(server.answer(r))
        await server.until(lambda: server.engine.stats().waiting == 1)
        slow.load()
        if announced:
            server.engine.wake()
        assert await asyncio.wait_for(task, PATIENCE) == expected([1], r.adapters)


async def test_failed_load_is_raised_to_each_reader() -> None:
    async with serve() as server:
        broken = FakeAdapter("broken", "broken-1")
        requests = [request([i], broken) for i in range(3)]
        tasks = [asyncio.create_task(server.failure(r)) for r in requests]
        await asyncio.sleep(0)
        broken.error = AdapterUnavailable("corrupt")
        server.engine.wake()
        assert await asyncio.gather(*tasks) == [broken.error] * 3
        await server.assert_baseline(*requests)


async def test_a_flood_of_requests_is_taken_in_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the engine's thread a moment; those who stream do not wait for all of them."""
    taken: list[int] = []
    plain = Engine.prepare

    def counting(engine: Engine) -> Batch | None:
        taken.append(len(engine._groups) + engine._finished)
        return plain(engine)

    monkeypatch.setattr(Engine, "prepare", counting)
    async with serve(gated=True, max_batch_rows=8, max_queue=1000) as server:
        first = request([0], max_new_tokens=100)
        flood = [request([i % 250], max_new_tokens=1) for i in range(300)]
        tasks = [asyncio.create_task(server.answer(first))]
        server.model.permits.release()
        await server.until(lambda: server.engine.stats().running == 1)
        tasks += [asyncio.create_task(server.answer(r)) for r in flood]
        await server.until(lambda: len(server.engine._inbox) == 300)
        server.model.open()
        await asyncio.gather(*tasks)
        steps = [later - earlier for earlier, later in pairwise(taken)]
        assert max(steps) == 64
        await server.assert_baseline(first, *flood)


class Waits(threading.Event):
    """The engine's own event; it counts how often the engine went to sleep, and says whether it sleeps now."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeps = 0
        self.asleep = False

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is None, "without requests there is nothing to look at later"
        self.sleeps += 1
        self.asleep = True
        super().wait()
        self.asleep = False
        return True


async def test_idle_engine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No spinning: without requests the engine's thread looks for work once each time it is woken, then waits until
    it is woken again. What counts is where it waits, not for how long nothing was seen to happen."""
    monkeypatch.setattr("loramux.engine.loop.threading.Event", Waits)
    looks = 0
    plain = Engine.prepare

    def counting(engine: Engine) -> Batch | None:
        nonlocal looks
        looks += 1
        return plain(engine)

    monkeypatch.setattr(Engine, "prepare", counting)
    async with serve() as server:
        wake = server.engine._wake
        assert isinstance(wake, Waits)
        await server.answer(request([1]))
        for _ in range(3):
            await server.until(lambda: wake.asleep and not wake.is_set())  # a busy engine never is
            before, slept = looks, wake.sleeps
            server.engine.wake()
            await server.until(lambda slept=slept: wake.sleeps > slept)  # type: ignore[misc]
            assert (looks, wake.sleeps) == (before + 1, slept + 1)


async def test_a_far_deadline_is_no_reason_to_die() -> None:
    """`wait` takes no more than 292 years; a client may give its call 11,000 of them."""
    async with serve(load_poll_seconds=1e30) as server:
        slow = FakeAdapter("slow", "slow-1")
        r = request([1], slow, deadline=3.6e11)
        task = asyncio.create_task(server.answer(r))
        await server.until(lambda: server.engine.stats().waiting == 1)
        slow.load()
        server.engine.wake()
        assert await task == expected([1], r.adapters)


async def test_drain_lets_running_requests_finish() -> None:
    async with serve(gated=True) as server:
        r, late = request([1]), request([2])
        task = asyncio.create_task(server.answer(r))
        await asyncio.sleep(0)
        drain = asyncio.create_task(server.engine.drain(20))
        await asyncio.sleep(0)
        assert isinstance(await server.failure(late), Draining)
        server.model.open()
        assert await drain == 0
        assert await task == expected([1])
        await server.assert_baseline(r, late)


async def test_drain_cancels_what_is_late() -> None:
    async with serve(gated=True) as server:
        r, waiting = request([1], max_new_tokens=200), request([2], FakeAdapter("slow", "slow-1"))
        tasks = [asyncio.create_task(server.failure(x)) for x in (r, waiting)]
        server.model.permits.release()
        await server.until(lambda: server.engine.stats().running == 1)
        drain = asyncio.create_task(server.engine.drain(0.01))
        await asyncio.sleep(0.05)
        server.model.open()
        assert await drain == 2
        assert {type(e) for e in await asyncio.gather(*tasks)} == {Draining}
        await server.assert_baseline(r, waiting)


async def test_stop_ends_what_runs() -> None:
    async with serve(gated=True) as server:
        r = request([1], max_new_tokens=200)
        task = asyncio.create_task(server.failure(r))
        await asyncio.sleep(0)
        stop = asyncio.create_task(server.engine.stop())
        await asyncio.sleep(0)
        server.model.open()
        await stop
        assert isinstance(await task, Draining)
        assert server.finished == [r]
        assert not server.engine.healthy


async def test_fault_fails_the_step_and_the_server_goes_on() -> None:
    async with serve() as server:
        server.model.fail_steps = 1
        bad, good = request([1]), request([2])
        assert isinstance(await server.failure(bad), EngineFault)
        assert await server.answer(good) == expected([2])
        assert server.engine.healthy
        await server.assert_baseline(bad, good)


async def test_death_of_the_thread_fails_everything_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream must not hang, nor end as an empty success, when the engine is gone."""
    async with serve(gated=True) as server:

        def broken() -> bool:
            raise AssertionError("books do not balance")

        requests = [request([1]), request([2], FakeAdapter("slow", "slow-1"))]
        tasks = [asyncio.create_task(server.failure(r)) for r in requests]
        await asyncio.sleep(0)
        monkeypatch.setattr(server.engine._engine, "prepare", broken)
        server.model.open()
        errors = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        assert {type(e) for e in errors} == {EngineFault}
        assert not server.engine.healthy
        after = request([3])
        assert isinstance(await server.failure(after), EngineFault)
        assert sorted(map(id, server.finished)) == sorted(map(id, [*requests, after]))


async def test_lease_owner_that_raises_harms_nobody() -> None:
    model = GatedModel()
    model.open()

    def on_finish(r: Request) -> None:
        raise RuntimeError("a defect in the registry")

    engine = AsyncEngine(model, byte_tokenizer(), EngineSettings(), on_finish=on_finish)
    await engine.start()
    server = Server(engine, model, [])
    assert await server.answer(request([1])) == expected([1])
    assert await engine.drain(5) == 0
    await engine.stop()


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_events_go_while_the_model_computes(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where forward only launches, between the launch and the wait; elsewhere before forward, which is the wait."""
    order: list[str] = []
    async with serve() as server:
        server.model.asynchronous = asynchronous
        forward, flush = server.model.forward, server.engine._flush
        monkeypatch.setattr(server.model, "forward", lambda inputs: (order.append("forward"), forward(inputs))[1])
        monkeypatch.setattr(server.engine, "_flush", lambda: (order.append("flush"), flush())[1])
        monkeypatch.setattr(
            "loramux.engine.engine.sample", lambda *given: (order.append("sample"), sampler.sample(*given))[1]
        )
        r = request([1, 2])
        assert await server.answer(r) == expected(r.prompt_ids)
    step = ["forward", "flush", "sample"] if asynchronous else ["flush", "forward", "sample"]
    first = order.index("forward") - step.index("forward")
    assert order[first : first + 24] == step * 8


@pytest.mark.parametrize("where", ["forward", "sample"])
async def test_a_lost_device_ends_every_request_and_is_told(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later step failed as well, and the process stayed."""
    async with serve(gated=True) as server:
        requests = [request([i], request_id=str(i)) for i in range(6)]
        failures = [asyncio.create_task(server.failure(r)) for r in requests]
        server.model.permits.release()
        await server.until(lambda: server.engine.stats().running == 4)
        assert not server.engine.device_lost.is_set()
        # Computed on another stream, a fault shows only where its result is waited for.
        lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        def fail(*args: Any) -> None:
            raise lost

        monkeypatch.setattr(
            *((server.model, "forward", fail) if where == "forward" else (engine_module, "sample", fail))
        )
        server.model.open()
        errors = await asyncio.gather(*failures)
        assert [(type(error), error.reason) for error in errors] == [(EngineFault, "DEVICE_LOST")] * 6
        assert "illegal" not in errors[0].message, "clients are told nothing of the internals"
        await asyncio.wait_for(server.engine.device_lost.wait(), PATIENCE)
        assert not server.engine.healthy
        assert isinstance(await server.failure(last := request([9])), EngineFault)
        assert sorted(map(id, server.finished)) == sorted(map(id, [*requests, last])), "leases: once each"

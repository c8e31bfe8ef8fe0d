"""Every way a request can end badly: the status says so, the work stops, and leases and counts are back at zero."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from loramux.answers import Started
from loramux.engine.door import Limits
from loramux.engine.request import Delta, Event, Request
from loramux.engine.settings import EngineSettings
from loramux.errors import (
    AdapterNotFound,
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineFault,
    InvalidRequest,
    Overloaded,
    SlowReader,
)
from loramux.rpc.flight import Admission
from loramux.rpc.merged import MergedOnly
from loramux.rpc.tokenizing import Tokenizing
from loramux.v1 import generation_pb2

from tests.engine.fakes import FakeModel
from tests.patience import PATIENCE
from tests.rpc.stack import ByteTokens, endless, finished, generation_stub, running, two_words

LONG: Any = {"max_new_tokens": 200, "ignore_eos": True}


async def test_a_client_that_cancels_stops_the_work(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",), model=FakeModel(delay=0.005)) as r:
        stream = r.client.stream("hello", adapter="a", **LONG)
        await anext(stream)
        await anext(stream)
        assert not r.at_baseline()
        await stream.aclose()
        await r.settle()
        task = asyncio.create_task(r.client.generate("hello", adapter="a", **LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await r.settle()
        assert r.engine.stats().computed_tokens < 200


async def test_a_client_that_vanishes_stops_the_work(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",), script=endless) as r:
        channel = grpc.aio.insecure_channel(r.addresses.public)
        stub = generation_stub(channel)
        request = generation_pb2.GenerateRequest(prompt="hi", adapter="a")
        call = stub.GenerateStream(generation_pb2.GenerateStreamRequest(request=request))
        await anext(aiter(call))
        assert r.engine.live
        await channel.close()
        await r.settle()


@pytest.mark.parametrize("when", ["before it is handed over", "while it tokenizes"])
async def test_a_request_that_is_cancelled_early_keeps_no_lease(tmp_path: Path, when: str) -> None:
    """Leases were released by the engine only, so a request that never reached it kept its adapter for ever."""

    class SlowTokens(ByteTokens):
        def encode(self, text: str, *how: Any) -> list[int]:
            time.sleep(0.2)
            return super().encode(text)

    async with running(tmp_path, adapters=("a",), script=two_words) as r:
        tokens = Tokenizing(SlowTokens() if when == "while it tokenizes" else ByteTokens(), r.engine.limits)
        admission = Admission(r.engine, r.registry, tokens, r.server.metrics, lambda: None, MergedOnly())
        message = generation_pb2.GenerateRequest(prompt="hi", adapter="a")
        admitted = asyncio.Event()

        async def go() -> None:
            async with admission.admit(message, None) as flight:
                admitted.set()
                await asyncio.Event().wait()
                await flight.start()

        task = asyncio.create_task(go())
        if when == "while it tokenizes":
            await asyncio.sleep(0.05)
            assert len(r.registry.get("a").leases) == 1
        else:
            await admitted.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert r.engine.seen == []
        await r.settle()
        tokens.close()


async def test_a_deadline_stops_the_work(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",), script=endless) as r:
        with pytest.raises(DeadlineExceeded):
            await r.client.generate("hello", adapter="a", timeout=0.199)  # gRPC rounds up to a whole millisecond
        await r.settle()
        assert 0 < r.engine.seen[0].deadline - r.engine.seen[0].arrival <= 0.2


async def test_a_deadline_that_passes_in_the_queue(tmp_path: Path) -> None:
    settings = EngineSettings(block_size=4, max_batch_rows=1)
    model = FakeModel(delay=0.005)
    async with running(tmp_path, adapters=("a",), engine_settings=settings, model=model) as r:
        first = asyncio.create_task(r.client.generate("one", **LONG))
        await r.until(running=1)
        with pytest.raises(DeadlineExceeded):
            await r.client.generate("two", adapter="a", timeout=0.03, **LONG)
        assert (await first).usage.completion_tokens == 200
        await r.settle()


async def test_a_full_queue_refuses_before_started(tmp_path: Path) -> None:
    settings = EngineSettings(block_size=4, max_batch_rows=1, max_queue=1)
    model = FakeModel(delay=0.005)
    async with running(tmp_path, adapters=("a",), engine_settings=settings, model=model) as r:
        runs = asyncio.create_task(r.client.generate("x", adapter="a", **LONG))
        await r.until(running=1)
        waits = asyncio.create_task(r.client.generate("x", adapter="a", **LONG))
        await r.until(running=1, waiting=1)
        with pytest.raises(Overloaded) as caught:
            await anext(r.client.stream("hello", adapter="a", **LONG))
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after > 0
        await asyncio.gather(runs, waits)
        await r.settle()


async def test_a_reader_that_stops_loses_its_stream_and_nobody_elses(tmp_path: Path) -> None:
    """The server buffered for ever, or stood still, for one client that never read."""

    async def flood(request: Request) -> AsyncIterator[Event]:
        if bytes(request.prompt_ids) == b"flood":
            while True:
                yield Delta(0, "x" * 65536, [1])
        yield Delta(0, "ok", [1])
        yield finished()

    async with running(tmp_path, adapters=("a",), script=flood, send_timeout=0.3) as r:
        stream = r.client.stream("flood", adapter="a")
        await anext(stream)
        async with asyncio.timeout(PATIENCE):
            while r.engine.live:
                assert (await r.client.generate("hi")).text == "ok"
                await asyncio.sleep(0.02)
        await r.settle()
        with pytest.raises(SlowReader) as caught:  # who reads on after all is told why
            async for _ in stream:
                pass
        assert caught.value.reason == "SLOW_READER"


async def test_a_stream_never_ends_well_without_a_finish(tmp_path: Path) -> None:
    """A stream that ended OK, with no token, after an internal failure: the client took it for an empty answer."""

    async def nothing(request: Request) -> AsyncIterator[Event]:
        if request is None:
            yield finished()

    async def half(request: Request) -> AsyncIterator[Event]:
        yield Delta(0, "so far", [1])
        yield finished(0, last=False)

    for script in (nothing, half):
        async with running(tmp_path, adapters=("a",), script=script) as r:
            with pytest.raises(EngineFault):
                async for _ in r.client.stream("hello", adapter="a"):
                    pass
            with pytest.raises(EngineFault):
                await r.client.generate("hello", adapter="a")
            await r.settle()


async def test_a_foreign_exception_shows_no_internals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request: Request) -> AsyncIterator[Event]:
        yield Delta(0, "x", [1])
        raise KeyError("/secret/path")

    async with running(tmp_path, adapters=("a",), script=broken) as r:
        with caplog.at_level(logging.ERROR), pytest.raises(EngineFault) as caught:
            await r.client.generate("hello", adapter="a")
        assert "secret" not in str(caught.value)
        assert "/secret/path" in caplog.text
        assert "hello" not in caplog.text
        await r.settle()


async def test_an_engine_fault_is_internal_and_fails_only_its_batch(tmp_path: Path) -> None:
    model = FakeModel()
    async with running(tmp_path, adapters=("a",), model=model) as r:
        model.fail_steps = 1
        with pytest.raises(EngineFault) as caught:
            await r.client.generate("hello", adapter="a", **LONG)
        assert "secret" not in str(caught.value)
        assert (await r.client.generate("hello", adapter="a", max_new_tokens=2)).completions
        await r.settle()


async def test_unload_cancels_what_still_runs(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",)) as r:
        stream = r.client.stream("hello", adapter="a", **LONG)
        assert isinstance(await anext(stream), Started)
        with pytest.raises(DeadlineExceeded):
            await r.admin.unload("a", drain_timeout=0)
        with pytest.raises(AdapterNotFound):
            await r.client.generate("hello", adapter="a")
        done = await r.admin.unload("a", drain_timeout=0, cancel_after_timeout=True)
        assert done.cancelled_requests == 1
        assert done.freed_bytes == len(b"weights of a")
        with pytest.raises(Cancelled) as caught:
            async for _ in stream:
                pass
        assert caught.value.reason == "ADAPTER_UNLOADED"
        await r.settle()


async def test_too_many_prompts_to_tokenize(tmp_path: Path) -> None:
    class Stuck(ByteTokens):
        def encode(self, text: str, *how: Any) -> list[int]:
            time.sleep(0.2)
            return super().encode(text)

    tokenizing = Tokenizing(Stuck(), Limits(vocab_size=260, max_context=256), max_waiting=2)
    message = generation_pb2.GenerateRequest(prompt="hi")
    tasks = [asyncio.create_task(tokenizing.ids(message)) for _ in range(3)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [list, list, Overloaded]
    assert await tokenizing.ids(message) == [104, 105]
    tokenizing.close()


async def test_a_storm_of_every_kind_leaves_nothing_behind(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a", "b"), engine_settings=EngineSettings(block_size=4, max_queue=8)) as r:

        async def one(i: int) -> str:
            try:
                match i % 5:
                    case 0:
                        await r.client.generate("hello", adapter="a", max_new_tokens=5)
                    case 1:
                        await r.client.generate("hello", mix={"a": 1, "b": 2}, timeout=0.01 * (i % 7), **LONG)
                    case 2:
                        stream = r.client.stream("hello", adapter="b", **LONG)
                        await anext(stream)
                        await stream.aclose()
                    case 3:
                        await r.client.generate("hello", adapter="nobody")
                    case 4:
                        await r.client.generate("hello", adapter="a", n=99)
            except (DeadlineExceeded, AdapterNotFound, InvalidRequest, Overloaded, Draining) as error:
                return type(error).__name__
            return "ok"

        ends = await asyncio.gather(*(one(i) for i in range(100)))
        assert {"ok", "AdapterNotFound", "InvalidRequest"} <= set(ends)
        await r.settle()

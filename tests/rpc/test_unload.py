"""An adapter is unloaded while a request that holds it is in each phase, and ends in each way: through the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from loramux.engine.settings import EngineSettings
from loramux.errors import Cancelled, EngineFault
from loramux.rpc.status import to_error
from loramux.v1 import generation_pb2 as pb

from tests.patience import PATIENCE
from tests.rpc.gates import GatedModel, GatedReader, GatedTokens
from tests.rpc.stack import Running, generation_stub, running

PHASES = ["tokenizing", "queued", "loading", "prefill", "decoding", "some of n done"]
ENDS = ["client cancels", "client vanishes", "operator cancels"]


class Scene:
    """One request for "a", brought into one phase; the gates stay closed until `go_on`."""

    def __init__(self, phase: str, streamed: bool) -> None:
        self.phase = phase
        self.streamed = streamed
        self.tokens, self.reader, self.model = GatedTokens(), GatedReader(), GatedModel()
        self.gates = [self.tokens.gate, self.reader.gate, self.model.gate]

    async def begin(self, r: Running, channel: grpc.aio.Channel) -> asyncio.Task[None]:
        self.r, self.stub = r, generation_stub(channel)
        self.model.gate.close()
        n, tokens = (3, 2) if self.phase == "some of n done" else (1, 50)
        match self.phase:
            case "tokenizing":
                self.tokens.gate.close()
                until = self.waits_at(self.tokens)
            case "queued":
                self.first = asyncio.create_task(r.client.generate("first", max_new_tokens=30, ignore_eos=True))
                await self.until(self.waits_at(self.model))
                until = lambda: r.engine.stats().waiting == 1  # noqa: E731
            case "loading":
                self.reader.gate.close()
                until = self.waits_at(self.reader)
            case "prefill":
                until = lambda: r.engine.stats().steps == 1  # noqa: E731 - of three that the prompt takes
            case "decoding":
                until = lambda: r.engine.stats().generated_tokens == 2  # noqa: E731
            case "some of n done":
                # The first has its two tokens, the second one of them; the third waits for a place. What the client
                # was told of it may still be under way.
                until = lambda: r.engine.stats().generated_tokens > 2  # noqa: E731
        sampling = pb.SamplingParams(max_new_tokens=tokens, ignore_eos=True, n=n)
        request = pb.GenerateRequest(prompt="a prompt of 20 bytes", adapter="a", sampling=sampling)
        task = asyncio.create_task(self.ask(request))
        async with asyncio.timeout(PATIENCE):
            while not until():
                if self.phase not in ("tokenizing", "loading") and self.model.gate.waiting:
                    await self.one_step()
                await asyncio.sleep(0.001)
        assert not task.done()
        assert len(r.registry.get("a").leases) == 1
        return task

    async def one_step(self) -> None:
        stats = self.r.engine.stats()
        self.model.gate.let_one_pass()
        await self.until(lambda: self.r.engine.stats().steps > stats.steps)
        await self.until(lambda: self.model.gate.waiting)

    async def ask(self, request: pb.GenerateRequest) -> None:
        try:
            if not self.streamed:
                await self.stub.Generate(request)
                return
            async for _ in self.stub.GenerateStream(pb.GenerateStreamRequest(request=request)):
                pass
        except grpc.aio.AioRpcError as error:
            details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
            raise to_error(error.code(), error.details() or "", details) from None

    def waits_at(self, gated: Any) -> Callable[[], object]:
        return lambda: gated.gate.waiting

    async def until(self, done: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not done():
                await asyncio.sleep(0.001)

    def go_on(self) -> None:
        for gate in self.gates:
            gate.open()


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "unary"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("phase", PHASES)
async def test_an_unload_ends_whatever_its_request_is_at(tmp_path: Path, phase: str, end: str, streamed: bool) -> None:
    scene = Scene(phase, streamed)
    rows = {"queued": 1, "some of n done": 2}.get(phase, 8)
    async with running(
        tmp_path,
        adapters=("a",),
        load=False,
        scan_interval=0.0,
        engine_settings=EngineSettings(block_size=4, max_batch_rows=rows, max_batch_tokens=8),
        tokens=scene.tokens,
        read=scene.reader,
        model=scene.model,
    ) as r:
        if phase != "loading":
            await r.admin.load("a")
        channel = grpc.aio.insecure_channel(r.addresses.public)
        task = await scene.begin(r, channel)
        entry = r.registry.get("a")
        operator, aborted, abort = end == "operator cancels", [], r.engine.abort
        r.engine.abort = lambda request_id, error: aborted.append(abort(request_id, error))
        timeout = 0.0 if operator else None
        unload = asyncio.create_task(r.admin.unload("a", drain_timeout=timeout, cancel_after_timeout=operator))
        await scene.until(lambda: r.registry.find("a") is None)
        if operator:
            await scene.until(lambda: aborted)
        elif end == "client cancels":
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        else:
            await channel.close()
            with suppress(Cancelled, asyncio.CancelledError):
                await task
        scene.go_on()
        async with asyncio.timeout(PATIENCE):
            done = await unload
        on_device = phase != "loading" or entry.digest != ""
        assert done.freed_bytes == (len(b"weights of a") if on_device else 0)
        if operator:
            assert done.cancelled_requests == 1
            with pytest.raises(Cancelled) as caught:
                await task
            assert caught.value.reason == "ADAPTER_UNLOADED"
        if phase == "queued":
            assert len((await scene.first).completions) == 1
        await r.settle()
        assert r.registry.entries() == []
        await scene.until(lambda: not r.registry.budget.reserved)
        assert r.registry.budget.used == 0
        assert r.engine.stats().kv_blocks_used == 0
        await channel.close()


@pytest.mark.parametrize("phase", ["prefill", "decoding", "some of n done"])
async def test_an_unload_ends_when_the_engine_fails_its_request(tmp_path: Path, phase: str) -> None:
    scene = Scene(phase, streamed=True)
    settings = EngineSettings(block_size=4, max_batch_rows=2, max_batch_tokens=8)
    async with (
        running(tmp_path, adapters=("a",), engine_settings=settings, tokens=scene.tokens, model=scene.model) as r,
        grpc.aio.insecure_channel(r.addresses.public) as channel,
    ):
        task = await scene.begin(r, channel)
        unload = asyncio.create_task(r.admin.unload("a"))
        await scene.until(lambda: r.registry.draining("a"))
        scene.model.fail_steps = 1
        scene.go_on()
        async with asyncio.timeout(PATIENCE):
            assert (await unload).freed_bytes == len(b"weights of a")
        with pytest.raises(EngineFault):
            await task
        await r.settle()
        assert r.registry.entries() == []
        assert r.engine.stats().kv_blocks_used == 0

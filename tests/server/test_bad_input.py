"""The list of bad input, each with its status and ErrorInfo, sent while good requests run in the same batches.

Whatever is sent, the good requests' answers do not change, and KV blocks, leases, queue places and bytes return to
where they began.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from loramux.v1 import adapters_pb2 as ad
from loramux.v1 import adapters_pb2_grpc, generation_pb2_grpc
from loramux.v1 import generation_pb2 as pb

from tests.server.stack import Stack

pytestmark = pytest.mark.asyncio(loop_scope="module")
GENERATE = "/loramux.v1.GenerationService/Generate"


@dataclass
class Wrong:
    """A request and the status it must get. `raw` is sent instead of a message's own bytes."""

    status: str
    message: pb.GenerateRequest | None = None
    raw: bytes | None = None
    reason: str = ""


def request(prompt: str | None = "Hello", adapter: str = "", **sampling: Any) -> pb.GenerateRequest:
    message = pb.GenerateRequest(adapter=adapter, sampling=pb.SamplingParams(**sampling))
    if prompt is not None:
        message.prompt = prompt
    return message


def ids(*values: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=values))


def chat(*turns: tuple[str, str]) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role=r, content=c) for r, c in turns]))


INVALID = "INVALID_ARGUMENT"
NAN = math.nan
REQUESTS: dict[str, Wrong] = {
    "unknown adapter": Wrong("NOT_FOUND", request(adapter="nobody"), reason="ADAPTER_NOT_FOUND"),
    "unknown adapter in a mix": Wrong(
        "NOT_FOUND", pb.GenerateRequest(prompt="x", mix=[pb.AdapterWeight(adapter="nobody", weight=1)])
    ),
    "adapter and mix": Wrong(
        INVALID, pb.GenerateRequest(prompt="x", adapter="a0", mix=[pb.AdapterWeight(adapter="a1", weight=1)])
    ),
    "mix weight NaN": Wrong(INVALID, pb.GenerateRequest(prompt="x", mix=[pb.AdapterWeight(adapter="a0", weight=NAN)])),
    "no input": Wrong(INVALID, request(None)),
    "empty prompt": Wrong(INVALID, request("")),
    "no token ids": Wrong(INVALID, ids()),
    "no chat messages": Wrong(INVALID, chat()),
    "unknown chat role": Wrong(INVALID, chat(("wizard", "hi"))),
    "chat that the template refuses": Wrong(INVALID, chat(("user", "hi"), ("system", "late"))),
    "prompt beyond the context": Wrong(INVALID, request("x" * 300)),
    "token id beyond the vocabulary": Wrong(INVALID, ids(1, 257)),
    "stop token beyond the vocabulary": Wrong(INVALID, request(stop_token_ids=[99999])),
    "logit bias beyond the vocabulary": Wrong(INVALID, request(logit_bias={99999: 1.0})),
    "logit bias NaN": Wrong(INVALID, request(logit_bias={1: NAN})),
    "n beyond the limit": Wrong(INVALID, request(n=17)),
    "n zero": Wrong(INVALID, request(n=0)),
    "too many stop strings": Wrong(INVALID, request(stop=["x"] * 17)),
    "empty stop string": Wrong(INVALID, request(stop=[""])),
    "endless stop string": Wrong(INVALID, request(stop=["x" * 100_000])),
    "too many top logprobs": Wrong(INVALID, request(top_logprobs=1000)),
    "max_new_tokens zero": Wrong(INVALID, request(max_new_tokens=0)),
    "min above max": Wrong(INVALID, request(min_new_tokens=9, max_new_tokens=3)),
    "negative temperature": Wrong(INVALID, request(temperature=-1)),
    "temperature NaN": Wrong(INVALID, request(temperature=NAN)),
    "temperature infinite": Wrong(INVALID, request(temperature=math.inf)),
    "top_p zero": Wrong(INVALID, request(top_p=0)),
    "top_p above one": Wrong(INVALID, request(top_p=1.5)),
    "top_p NaN": Wrong(INVALID, request(top_p=NAN)),
    "min_p negative": Wrong(INVALID, request(min_p=-0.1)),
    "min_p NaN": Wrong(INVALID, request(min_p=NAN)),
    "repetition penalty zero": Wrong(INVALID, request(repetition_penalty=0)),
    "repetition penalty NaN": Wrong(INVALID, request(repetition_penalty=NAN)),
    "frequency penalty 3": Wrong(INVALID, request(frequency_penalty=3)),
    "presence penalty NaN": Wrong(INVALID, request(presence_penalty=NAN)),
    "priority 1000": Wrong(INVALID, pb.GenerateRequest(prompt="x", priority=1000)),
    "endless request id": Wrong(INVALID, pb.GenerateRequest(prompt="x", request_id="r" * 10_000)),
    "endless cache salt": Wrong(INVALID, pb.GenerateRequest(prompt="x", cache_salt="s" * 100_000)),
    "invalid UTF-8": Wrong(INVALID, raw=b"\x12\x04\xff\xfe\xfd\xfc"),
    "not a message": Wrong(INVALID, raw=b"\xff\xff\xff\xff"),
    # sampling (7) given as a string, temperature (3) as a varint
    "wrong types": Wrong(INVALID, raw=b"\x12\x02hi\x3a\x05hello"),
    "6 MB message": Wrong(INVALID, request("x" * 6_000_000)),
    # Beyond twice the limit gRPC itself refuses, before any of our code runs: no ErrorInfo can be added there.
    "100 MB message": Wrong("RESOURCE_EXHAUSTED", request("x" * 100_000_000), reason="(gRPC)"),
}


def error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, f"no details: {error}"
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info
    raise AssertionError(f"no ErrorInfo among {status.details}")


class Background:
    """Good requests that run all the time; their answers must stay what they were."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._expected: dict[str, str] = {}
        self.answers = 0

    async def learn(self) -> None:
        for name in ("", "a0", "a4"):
            self._expected[name] = await self._ask(name)

    async def _ask(self, name: str) -> str:
        result = await self._stack.client.generate("Hello", adapter=name, max_new_tokens=12, ignore_eos=True)
        return result.text

    async def during(self, work: Awaitable[Any]) -> Any:
        stop = asyncio.Event()

        async def again(name: str) -> None:
            while True:
                assert await self._ask(name) == self._expected[name]
                self.answers += 1
                if stop.is_set():
                    return

        good = [asyncio.create_task(again(name)) for name in self._expected]
        try:
            return await work
        finally:
            stop.set()
            await asyncio.gather(*good)


async def test_requests(stack: Stack) -> None:
    good = Background(stack)
    await good.learn()
    baseline = stack.counts()
    send = stack.channel.unary_unary(GENERATE, request_serializer=lambda raw: raw)

    async def send_all() -> None:
        for name, wrong in REQUESTS.items():
            raw = wrong.raw if wrong.message is None else wrong.message.SerializeToString()
            try:
                await send(raw, timeout=30)
            except grpc.RpcError as error:
                assert error.code().name == wrong.status, f"{name}: {error.details()}"
                assert error.details(), name
                if wrong.reason == "(gRPC)":
                    continue
                info = error_info(error)
                assert (info.domain, bool(info.reason)) == ("loramux", True), name
                assert wrong.reason in ("", info.reason), name
            else:
                raise AssertionError(f"{name} was answered")

    await good.during(send_all())
    assert good.answers >= 3
    await stack.settle(baseline)


async def test_names(stack: Stack) -> None:
    baseline = stack.counts()
    service: Any = adapters_pb2_grpc.AdapterServiceStub(  # type: ignore[no-untyped-call]
        grpc.aio.insecure_channel(stack.addresses.admin)
    )
    calls: list[tuple[Any, str]] = [
        (service.LoadAdapter(ad.LoadAdapterRequest(name="")), INVALID),
        (service.LoadAdapter(ad.LoadAdapterRequest(name="../up")), INVALID),
        (service.LoadAdapter(ad.LoadAdapterRequest(name="x" * 200)), INVALID),
        (service.LoadAdapter(ad.LoadAdapterRequest(name="a0", source="a1")), "ALREADY_EXISTS"),
        (service.UnloadAdapter(ad.UnloadAdapterRequest(name="nobody")), "NOT_FOUND"),
        (service.GetAdapter(ad.GetAdapterRequest(name="nobody")), "NOT_FOUND"),
        (service.UpdateAdapter(ad.UpdateAdapterRequest(name="nobody", pinned=True)), "NOT_FOUND"),
    ]
    for call, status in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code().name == status, caught.value.details()
        assert error_info(caught.value).domain == "loramux"
    assert stack.counts() == baseline
    again = await stack.admin.load("a0", "a0")
    assert again.state == "ready", "the same content again is no error"


async def test_clients_that_go_away(stack: Stack) -> None:
    """Disconnect mid-stream, a deadline while queued, a deadline while running: the work stops."""
    good = Background(stack)
    await good.learn()
    baseline = stack.counts()

    async def leave() -> None:
        for adapter in ("", "a1", "a3"):
            async with grpc.aio.insecure_channel(stack.addresses.public) as channel:
                stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
                endless = request(adapter=adapter, max_new_tokens=200, ignore_eos=True, n=2)
                stream = stub.GenerateStream(pb.GenerateStreamRequest(request=endless))
                async for event in stream:
                    if event.WhichOneof("event") == "delta":
                        break  # and the channel closes
        stub = generation_pb2_grpc.GenerationServiceStub(stack.channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request(max_new_tokens=200, ignore_eos=True, n=8), timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    await good.during(leave())
    await stack.settle(baseline)


async def test_a_deadline_that_passes_in_the_queue(stack: Stack) -> None:
    baseline = stack.counts()
    stub: Any = generation_pb2_grpc.GenerationServiceStub(stack.channel)  # type: ignore[no-untyped-call]
    # Twice as many sequences as may run together: some requests never leave the queue in time.
    calls = [stub.Generate(request(max_new_tokens=200, ignore_eos=True, n=8), timeout=0.3) for _ in range(8)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(r, grpc.aio.AioRpcError) for r in results)
    assert {r.code().name for r in results if isinstance(r, grpc.aio.AioRpcError)} == {"DEADLINE_EXCEEDED"}
    await stack.settle(baseline)


async def test_a_client_that_never_reads(stack: Stack) -> None:
    """Its stream waits on itself alone: the sequence runs to its end and gives everything back."""
    good = Background(stack)
    await good.learn()
    baseline = stack.counts()
    channel = grpc.aio.insecure_channel(stack.addresses.public, options=[("grpc.http2.lookahead_bytes", 1024)])
    stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    endless = request(adapter="a2", max_new_tokens=200, ignore_eos=True, n=8, top_logprobs=20)
    streams = [stub.GenerateStream(pb.GenerateStreamRequest(request=endless)) for _ in range(3)]
    await asyncio.gather(*(stream.read() for stream in streams))  # the first message, then never again
    entry = stack.application.adapters.registry.get("a2")

    async def given_back() -> None:
        async with asyncio.timeout(60):
            while entry.leases:
                await asyncio.sleep(0.02)

    await good.during(given_back())
    await stack.settle(baseline)
    await channel.close()


async def test_health_of_the_batch_after_all_this(stack: Stack) -> None:
    stats = stack.application.engine.stats()
    assert stats.healthy
    assert stats.faults == 0
    assert json.dumps(stack.counts())

"""Whatever ends a request, it counts once, by what its caller got; and the log has one line of it, under its id."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from loramux.engine.request import Delta, Event, Request
from loramux.engine.settings import EngineSettings
from loramux.errors import LoramuxError
from loramux.logs import JsonFormatter, TextFormatter
from loramux.metrics import FINISHED_REASONS
from loramux.rpc import status
from loramux.v1.generation_pb2 import GenerateRequest, GenerateStreamRequest, SamplingParams

from tests.engine.fakes import FakeModel
from tests.patience import PATIENCE
from tests.rpc.gates import GatedTokens
from tests.rpc.stack import Running, endless, finished, generation_stub, running, two_words

LONG = SamplingParams(max_new_tokens=200, ignore_eos=True)
METHOD = "/loramux.v1.GenerationService/Generate"


def req(prompt: str = "hi", **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, **fields)


@dataclass
class Caller:
    """Sends requests as unary calls or as streams; `sent` counts them, `tokens` what came of streams."""

    r: Running
    channel: grpc.aio.Channel
    streamed: bool
    sent: int = 0
    tokens: int = 0

    def start(self, request: GenerateRequest, **how: Any) -> Any:
        self.sent += 1
        stub = generation_stub(self.channel)
        if self.streamed:
            return stub.GenerateStream(GenerateStreamRequest(request=request), **how)
        return stub.Generate(request, **how)

    async def end(self, call: Any) -> grpc.aio.AioRpcError | None:
        """Read to the end."""
        try:
            if self.streamed:
                async for event in call:
                    self.tokens += len(event.delta.token_ids)
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return error
        return None

    async def ask(self, request: GenerateRequest, **how: Any) -> grpc.aio.AioRpcError | None:
        return await self.end(self.start(request, **how))


Way = Callable[[Caller], Awaitable[None]]


@dataclass
class Case:
    """What happens, on a server set up so, and the one outcome that is counted."""

    way: Way
    status: str
    reason: str
    server: dict[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    finished_reason: str | None = None  # of vllm:request_success; None: the engine never had it
    unary: bool = True


def asks(request: GenerateRequest, **how: Any) -> Way:
    async def way(caller: Caller) -> None:
        await caller.ask(request, **how)

    return way


async def cancels_early(caller: Caller) -> None:
    call = caller.start(req("hello", sampling=LONG))
    await caller.r.until(running=1)
    call.cancel()


async def cancels_while_it_is_tokenized(caller: Caller) -> None:
    tokens = caller.r.server._tokenizing._tokenizer
    assert isinstance(tokens, GatedTokens)
    tokens.gate.close()
    call = caller.start(req())
    while not tokens.gate.waiting:
        await asyncio.sleep(0.001)
    call.cancel()
    await outcomes(caller.r, 1)
    tokens.gate.open()


async def cancels_in_the_middle(caller: Caller) -> None:
    call = caller.start(req("hello", adapter="a", sampling=LONG))
    if caller.streamed:
        async for event in call:
            caller.tokens += len(event.delta.token_ids)
            if caller.tokens >= 3:
                break
    else:
        await counted(caller.r, "vllm:generation_tokens_total", 3)
    call.cancel()


async def connection_breaks(caller: Caller) -> None:
    caller.start(req("hello", sampling=LONG))
    await caller.r.until(running=1)
    await caller.channel.close()


async def queue_is_full(caller: Caller) -> None:
    first = caller.start(req("one", sampling=LONG))
    await caller.r.until(running=1)
    second = caller.start(req("two", sampling=LONG))
    await caller.r.until(running=1, waiting=1)
    await caller.ask(req("three"))
    first.cancel()
    second.cancel()


async def deadline_in_the_queue(caller: Caller) -> None:
    first = caller.start(req("one", sampling=LONG))
    await caller.r.until(running=1)
    await caller.ask(req("two"), timeout=0.2)
    first.cancel()


async def never_reads(caller: Caller) -> None:
    call = caller.start(req())
    await outcomes(caller.r, 1)
    await caller.end(call)


async def operator_unloads(caller: Caller) -> None:
    call = caller.start(req("hello", adapter="a", sampling=LONG))
    await caller.r.until(running=1)
    await caller.r.admin.unload("a", drain_timeout=0, cancel_after_timeout=True)
    await caller.end(call)


async def comes_while_it_drains(caller: Caller) -> None:
    running_one = caller.start(req("hello", sampling=LONG))
    await caller.r.until(running=1)
    drain = asyncio.create_task(caller.r.server.drain())
    await asyncio.sleep(0)
    await caller.ask(req())
    running_one.cancel()
    await drain


async def drain_has_no_time(caller: Caller) -> None:
    call = caller.start(req("hello", sampling=LONG))
    await caller.r.until(running=1)
    drain = asyncio.create_task(caller.r.server.drain())
    await caller.end(call)
    await drain


async def engine_fails(caller: Caller) -> None:
    caller.r.engine._engine.model.fail_steps = 1
    await caller.ask(req("hello", sampling=LONG))


async def sends_no_message(caller: Caller) -> None:
    caller.sent += 1
    open_call: Any = caller.channel.unary_stream if caller.streamed else caller.channel.unary_unary
    call = open_call(METHOD + "Stream" * caller.streamed)(b"\xff\xff\xff\xff")
    with suppress(grpc.aio.AioRpcError):
        await (anext(aiter(call)) if caller.streamed else call)


async def broken(request: Request) -> AsyncIterator[Event]:
    yield Delta(0, "x", [1])
    raise KeyError("/secret/path")


async def half(request: Request) -> AsyncIterator[Event]:
    if request is None:
        yield finished()


async def flood(request: Request) -> AsyncIterator[Event]:
    while True:
        yield Delta(0, "x" * 65536, [1])


ONE_AT_A_TIME = {"engine_settings": EngineSettings(block_size=4, max_batch_rows=1, max_queue=1)}
SLOW = {"model": FakeModel(delay=0.005)}
CASES = {
    "stop": Case(asks(req()), "OK", "stop", {"script": two_words}, finished_reason="stop"),
    "length": Case(asks(req(sampling=SamplingParams(max_new_tokens=3))), "OK", "length", finished_reason="length"),
    "several": Case(
        asks(req(sampling=SamplingParams(n=3, max_new_tokens=3))), "OK", "length", finished_reason="length"
    ),
    "no message": Case(sends_no_message, "INVALID_ARGUMENT", "MALFORMED_MESSAGE"),
    "too large": Case(asks(req("x" * 150)), "INVALID_ARGUMENT", "MESSAGE_TOO_LARGE", {"max_message_bytes": 100}),
    "no token": Case(asks(req()), "UNAUTHENTICATED", "TOKEN_MISSING", {"api_key": "right-key"}),
    "bad value": Case(asks(req(sampling=SamplingParams(n=99))), "INVALID_ARGUMENT", "INVALID_VALUE"),
    "no input": Case(asks(GenerateRequest()), "INVALID_ARGUMENT", "EMPTY_PROMPT"),
    "too long": Case(asks(req("x" * 300)), "INVALID_ARGUMENT", "PROMPT_TOO_LONG"),
    "unknown adapter": Case(asks(req(adapter="nobody")), "NOT_FOUND", "ADAPTER_NOT_FOUND"),
    "queue full": Case(queue_is_full, "RESOURCE_EXHAUSTED", "QUEUE_FULL", ONE_AT_A_TIME | SLOW),
    "deadline, queued": Case(
        deadline_in_the_queue, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", ONE_AT_A_TIME | SLOW, finished_reason="abort"
    ),
    "deadline, running": Case(
        asks(req(), timeout=0.3),
        "DEADLINE_EXCEEDED",
        "DEADLINE_EXCEEDED",
        {"script": endless},
        finished_reason="abort",
    ),
    "cancelled": Case(cancels_early, "CANCELLED", "CANCELLED", SLOW, finished_reason="abort"),
    "cancelled, tokenized": Case(cancels_while_it_is_tokenized, "CANCELLED", "CANCELLED", {"tokens": GatedTokens()}),
    "cancelled, some tokens": Case(
        cancels_in_the_middle, "CANCELLED", "CANCELLED", SLOW, adapters=("a",), finished_reason="abort"
    ),
    "connection broken": Case(connection_breaks, "CANCELLED", "CANCELLED", SLOW, finished_reason="abort"),
    "slow reader": Case(
        never_reads,
        "ABORTED",
        "SLOW_READER",
        {"script": flood, "send_timeout": 0.2},
        finished_reason="abort",
        unary=False,
    ),
    "unloaded": Case(operator_unloads, "CANCELLED", "ADAPTER_UNLOADED", SLOW, adapters=("a",), finished_reason="abort"),
    "draining": Case(comes_while_it_drains, "UNAVAILABLE", "DRAINING", SLOW),
    "drained": Case(
        drain_has_no_time, "UNAVAILABLE", "DRAINING", SLOW | {"drain_timeout": 0.0}, finished_reason="abort"
    ),
    "engine fault": Case(engine_fails, "INTERNAL", "ENGINE_FAULT", finished_reason="error"),
    "defect": Case(asks(req()), "INTERNAL", "ENGINE_FAULT", {"script": broken}, finished_reason="error"),
    "no end": Case(asks(req()), "INTERNAL", "ENGINE_FAULT", {"script": half}, finished_reason="error"),
}


def samples(r: Running, name: str) -> dict[tuple[str, ...], float]:
    """The samples of one name by the values of their labels, without the model's."""
    return {
        tuple(value for label, value in sample.labels.items() if label != "model_name"): sample.value
        for family in r.server.metrics.registry.collect()
        for sample in family.samples
        if sample.name == name
    }


async def counted(r: Running, name: str, least: float) -> dict[tuple[str, ...], float]:
    """The samples of one name, once they add up to so much."""
    async with asyncio.timeout(PATIENCE):
        while sum((found := samples(r, name)).values()) < least:
            await asyncio.sleep(0.005)
    return found


async def outcomes(r: Running, least: float) -> dict[tuple[str, ...], float]:
    return await counted(r, "loramux_request_outcomes_total", least)


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("name", CASES)
async def test_every_request_has_one_outcome(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, streamed: bool
) -> None:
    case = CASES[name]
    if not streamed and not case.unary:
        pytest.skip("only a stream can be read slowly")
    caplog.set_level(logging.INFO, "loramux.rpc.telemetry")
    async with running(tmp_path, adapters=case.adapters, **case.server) as r:
        caller = Caller(r, grpc.aio.insecure_channel(r.addresses.public), streamed)
        await case.way(caller)
        found = await outcomes(r, caller.sent)
        await r.settle()
        assert samples(r, "loramux_request_outcomes_total") == found
        assert found[case.status, case.reason] == 1
        assert sum(found.values()) == caller.sent
        taken = samples(r, "vllm:request_success_total")
        assert {reason for (reason,) in taken} == set(FINISHED_REASONS)
        assert case.finished_reason is None or taken[case.finished_reason,] >= 1
        assert sum(taken.values()) <= caller.sent - (case.finished_reason is None)
        assert sum(samples(r, "vllm:generation_tokens_total").values()) >= caller.tokens
        if case.adapters:
            assert sum(samples(r, "loramux_adapter_requests_total").values()) == 1
        lines = [record for record in caplog.records if record.message == "request"]
        assert len(lines) == caller.sent
        timed = [line for line in map(TextFormatter().format, lines) if "cached_tokens=" in line]
        assert len(timed) == sum(taken.values())  # all that the engine had, however they ended
        assert all(f" {part}_seconds=" in line for line in timed for part in ("queue", "prefill", "decode"))
        await caller.channel.close()


async def test_the_line_of_a_failed_request_tells_how_far_it_came(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only those that ended well had cached tokens, and where the time went."""
    caplog.set_level(logging.INFO, "loramux.rpc.telemetry")
    prompt = "eight by eight by eight"
    async with running(tmp_path, **ONE_AT_A_TIME | SLOW) as r:
        await r.client.generate(prompt, max_new_tokens=1)  # so that the next one finds it in the cache
        stream = r.client.stream(prompt, max_new_tokens=200, ignore_eos=True)
        for _ in range(4):
            await anext(stream)
        waits = asyncio.create_task(r.client.generate("waits"))
        await r.until(waiting=1)
        waits.cancel()
        await outcomes(r, 2)
        await stream.aclose()
        await outcomes(r, 3)
        lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.message == "request"]
    first, queued, decoding = lines
    assert (first["status"], first["cached_tokens"]) == ("OK", 0)
    assert (queued["status"], queued["cached_tokens"]) == ("CANCELLED", 0)
    assert queued["queue_seconds"] > 0
    assert queued["prefill_seconds"] == queued["decode_seconds"] == 0
    assert (decoding["status"], decoding["cached_tokens"]) == ("CANCELLED", 20)
    assert decoding["prefill_seconds"] > 0
    assert decoding["decode_seconds"] > 0


async def test_tokens_count_as_they_are_delivered(tmp_path: Path) -> None:
    """The tokens of a request that was cancelled were in no counter, and those of any request not before its end."""
    go_on = asyncio.Event()

    async def stops_half_way(request: Request) -> AsyncIterator[Event]:
        yield Delta(0, "x", [1])
        yield Delta(0, "yz", [2, 3])
        await go_on.wait()
        yield finished()

    async with running(tmp_path, adapters=("a",), script=stops_half_way) as r:
        stream = r.client.stream("hello", adapter="a")
        for _ in range(3):
            await anext(stream)
        assert samples(r, "vllm:generation_tokens_total") == {(): 3}
        assert samples(r, "vllm:prompt_tokens_total") == {(): 5}
        assert samples(r, "vllm:time_to_first_token_seconds_count") == {(): 1}
        assert samples(r, "loramux_adapter_generated_tokens_total") == {("a",): 3}
        assert sum(samples(r, "loramux_request_outcomes_total").values()) == 0
        await stream.aclose()
        assert await outcomes(r, 1) == {("CANCELLED", "CANCELLED"): 1}
        assert samples(r, "vllm:generation_tokens_total") == {(): 3}
        assert samples(r, "vllm:e2e_request_latency_seconds_count") == {(): 0}


def info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    rich = status_pb2.Status.FromString(dict(error.trailing_metadata())[status.DETAILS_KEY])
    found = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(found)
    return found


REFUSED = [req(adapter="nobody"), req(""), req(sampling=SamplingParams(n=99))]


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
async def test_errors_carry_the_callers_id(tmp_path: Path, streamed: bool) -> None:
    async with running(tmp_path, api_key="right-key") as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        caller = Caller(r, channel, streamed)
        key = ("authorization", "Bearer right-key")
        for request in REFUSED:
            request.request_id = "mine"
            error = await caller.ask(request, metadata=(key, ("x-request-id", "the proxy's")))
            assert error is not None
            assert info(error).metadata["request_id"] == "mine"
            assert dict(error.trailing_metadata())["x-request-id"] == "mine"
            request.request_id = ""
            error = await caller.ask(request, metadata=(key, ("x-request-id", "of-the-proxy")))
            assert error is not None
            assert info(error).metadata["request_id"] == "of-the-proxy"
            error = await caller.ask(request, metadata=(key, ("x-request-id", "x" * 4000)))
            assert error is not None
            assert len(info(error).metadata["request_id"]) == 32
        error = await caller.ask(req(request_id="mine"), metadata=(("x-request-id", "of-the-proxy"),))
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert info(error).metadata["request_id"] == "of-the-proxy"  # strangers' messages are not read
        error = await caller.ask(req(request_id="ü" * 128, adapter="nobody"), metadata=(key,))
        assert error is not None
        assert info(error).metadata["request_id"] == "ü" * 128


NOT_PARSED = {
    "TOO_LARGE": req("x" * 150_000, request_id="mine").SerializeToString(),
    "TOO_MANY": req(request_id="mine", sampling=SamplingParams(stop=["x"] * 20_000)).SerializeToString(),
    "NO_UTF8": b"\x0a\x04mine\x12\x02\xff\xfe",
    "BROKEN": b"\x0a\x04mine\xff\xff\xff\xff",
}


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
async def test_what_is_refused_before_it_is_parsed_has_the_callers_id(
    tmp_path: Path, streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="loramux")
    service = "/loramux.v1.GenerationService/"
    async with (
        running(tmp_path, max_message_bytes=100_000) as r,
        grpc.aio.insecure_channel(r.addresses.public) as channel,
    ):
        for name, raw in NOT_PARSED.items():
            if streamed:
                size = len(raw)
                around = bytes(
                    [0x0A, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]
                )  # field 1, length in 3 bytes
                call: Any = channel.unary_stream(service + "GenerateStream")(around + raw)
                refused = anext(aiter(call))
            else:
                refused = channel.unary_unary(service + "Generate")(raw)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert info(caught.value).metadata["request_id"] == "mine", name
        lines = [TextFormatter().format(record) for record in caplog.records if record.getMessage() == "request"]
        assert [" id=mine " in line for line in lines] == [True] * len(NOT_PARSED)


async def test_the_log_has_the_callers_id_and_never_the_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log named an id that was made inside the server: nobody could find a request of theirs again."""
    caplog.set_level(logging.DEBUG)
    caplog.handler.setFormatter(TextFormatter())
    model = FakeModel()
    hostile = "mine\n2026-01-01 I request id=other status=OK\x1b[2J"
    async with running(tmp_path, adapters=("a",), model=model) as r:
        result = await r.client.generate("the secret prompt", adapter="a", max_new_tokens=2, request_id="good-one")
        uid = result.adapters[0].uid
        model.fail_steps = 1
        with suppress(LoramuxError):
            await r.client.generate("the secret prompt", max_new_tokens=2, request_id=hostile)
        made = (await r.client.generate("the secret prompt", max_new_tokens=2)).request_id
        await r.settle()
    written = caplog.text
    assert "secret prompt" not in written
    lines = written.rstrip("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    (good,) = [line for line in lines if "request id=good-one" in line]
    for part in ("status=OK", "reason=length", "adapters=a", f"uids={uid}", "prompt_tokens=17", "output_tokens=2"):
        assert f" {part} " in good
    for part in ("cached_tokens=", "queue_seconds=", "prefill_seconds=", "decode_seconds=", "total_seconds="):
        assert part in good
    assert any(f"request id={made}" in line for line in lines)
    assert not any(line.startswith("2026-01-01") for line in lines)
    fault = [line for line in lines if "engine fault" in line]
    assert len(fault) == 1
    assert "mine" in fault[0]

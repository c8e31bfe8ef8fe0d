"""Bad input, each with its status, reason and field; the server serves on as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from loramux.errors import Overloaded
from loramux.rpc import status
from loramux.v1 import adapters_pb2
from loramux.v1.generation_pb2 import (
    AdapterWeight,
    Chat,
    ChatMessage,
    CountTokensRequest,
    GenerateRequest,
    SamplingParams,
    TokenIds,
)

from tests.rpc.stack import Running, adapter_stub, generation_stub, running, write_adapter

NAN = float("nan")


def req(prompt: str = "hi", **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, **fields)


def knobs(**sampling: Any) -> GenerateRequest:
    return req(sampling=SamplingParams(**sampling))


def turns(*turns: tuple[str, str]) -> GenerateRequest:
    return GenerateRequest(chat=Chat(messages=[ChatMessage(role=r, content=c) for r, c in turns]))


def mix(*parts: tuple[str, float], **fields: Any) -> GenerateRequest:
    return req(mix=[AdapterWeight(adapter=name, weight=weight) for name, weight in parts], **fields)


# name: (request, status, reason, field)
GENERATE: dict[str, tuple[GenerateRequest, str, str, str]] = {
    "unknown adapter": (req(adapter="nobody"), "NOT_FOUND", "ADAPTER_NOT_FOUND", ""),
    "unknown adapter in a mix": (mix(("a", 1), ("nobody", 1)), "NOT_FOUND", "ADAPTER_NOT_FOUND", ""),
    "a path as a name": (req(adapter="../a"), "NOT_FOUND", "ADAPTER_NOT_FOUND", ""),
    "a megabyte of name": (req(adapter="ä" * 500_000), "NOT_FOUND", "ADAPTER_NOT_FOUND", ""),
    "a failed adapter": (req(adapter="broken"), "FAILED_PRECONDITION", "ADAPTER_UNAVAILABLE", ""),
    "adapter and mix": (mix(("a", 1), adapter="a"), "INVALID_ARGUMENT", "INVALID_VALUE", "mix"),
    "an adapter twice": (mix(("a", 1), ("a", 1)), "INVALID_ARGUMENT", "INVALID_VALUE", "mix[1].adapter"),
    "a mix without a name": (mix(("", 1)), "INVALID_ARGUMENT", "INVALID_VALUE", "mix[0].adapter"),
    "a NaN weight": (mix(("a", NAN)), "INVALID_ARGUMENT", "INVALID_VALUE", "mix[0].weight"),
    "an infinite weight": (mix(("a", float("inf"))), "INVALID_ARGUMENT", "INVALID_VALUE", "mix[0].weight"),
    "a weight that is no float32": (mix(("a", 1e39)), "INVALID_ARGUMENT", "INVALID_VALUE", "mix[0].weight"),
    "DoRA in a mix": (mix(("a", 1), ("dora", 1)), "INVALID_ARGUMENT", "ADAPTER_NOT_MIXABLE", "mix[1].adapter"),
    "DoRA with a weight": (mix(("dora", 0.5)), "INVALID_ARGUMENT", "ADAPTER_NOT_MIXABLE", "mix[0].adapter"),
    "no input": (GenerateRequest(), "INVALID_ARGUMENT", "EMPTY_PROMPT", "input"),
    "empty prompt": (req(""), "INVALID_ARGUMENT", "EMPTY_PROMPT", "prompt"),
    "no ids": (GenerateRequest(token_ids=TokenIds()), "INVALID_ARGUMENT", "EMPTY_PROMPT", "token_ids"),
    "no turns": (turns(), "INVALID_ARGUMENT", "EMPTY_PROMPT", "chat.messages"),
    "unknown role": (turns(("root", "x")), "INVALID_ARGUMENT", "INVALID_VALUE", "chat.messages[0].role"),
    "refused by the template": (turns(("assistant", "x")), "INVALID_ARGUMENT", "INVALID_VALUE", "chat.messages"),
    "prompt beyond the context": (req("x" * 300), "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "prompt"),
    "id beyond the vocabulary": (
        GenerateRequest(token_ids=TokenIds(ids=[1, 4_000_000_000])),
        "INVALID_ARGUMENT",
        "TOKEN_ID_OUT_OF_RANGE",
        "token_ids",
    ),
    "n = 0": (knobs(n=0), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.n"),
    "n too large": (knobs(n=4_000_000_000), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.n"),
    "too many logprobs": (knobs(top_logprobs=1000), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.top_logprobs"),
    "too many stop strings": (knobs(stop=["x"] * 99), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.stop"),
    "empty stop string": (knobs(stop=[""]), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.stop[0]"),
    "NaN temperature": (knobs(temperature=NAN), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.temperature"),
    "negative temperature": (knobs(temperature=-1), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.temperature"),
    "top_p = 0": (knobs(top_p=0), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.top_p"),
    "NaN top_p": (knobs(top_p=NAN), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.top_p"),
    "min_p > 1": (knobs(min_p=1.5), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.min_p"),
    "penalty": (knobs(frequency_penalty=3), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.frequency_penalty"),
    "no tokens": (knobs(max_new_tokens=0), "INVALID_ARGUMENT", "INVALID_VALUE", "sampling.max_new_tokens"),
    "bias of no token": (
        knobs(logit_bias={9999: 1}),
        "INVALID_ARGUMENT",
        "TOKEN_ID_OUT_OF_RANGE",
        "sampling.logit_bias",
    ),
    "long request_id": (req(request_id="x" * 129), "INVALID_ARGUMENT", "INVALID_VALUE", "request_id"),
    "priority": (req(priority=101), "INVALID_ARGUMENT", "INVALID_VALUE", "priority"),
}


def check(error: grpc.aio.AioRpcError, code: str, reason: str, field: str = "") -> None:
    """The status, its ErrorInfo and, where a field is to blame, its BadRequest."""
    assert (error.code().name, error.details() != "") == (code, True), error.details()
    rich = status_pb2.Status.FromString(dict(error.trailing_metadata())[status.DETAILS_KEY])
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("loramux", reason)
    assert info.metadata["request_id"] == dict(error.trailing_metadata())["x-request-id"]
    if field:
        bad = error_details_pb2.BadRequest()
        assert rich.details[1].Unpack(bad)
        assert [violation.field for violation in bad.field_violations] == [field]
        assert bad.field_violations[0].description


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def serves_on(r: Running) -> None:
    assert (await r.client.generate("hi", adapter="a", max_new_tokens=2)).completions
    await r.settle()


async def test_generate_refuses_what_it_should(tmp_path: Path) -> None:
    write_adapter(tmp_path, "broken", b"bad")
    write_adapter(tmp_path, "dora", b"dora")
    async with running(tmp_path, adapters=("a",)) as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        with pytest.raises(Exception, match="holds NaN"):
            await r.manager.load("broken")
        await r.manager.load("dora")
        stub = generation_stub(channel)
        for name, (request, code, reason, field) in GENERATE.items():
            try:
                check(await refused(stub.Generate(request)), code, reason, field)
            except BaseException as failure:
                failure.add_note(f"the case: {name}")
                raise
        await serves_on(r)


async def test_streams_refuse_with_a_status_and_no_message(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",)) as r:
        for bad in (req(adapter="nobody"), knobs(n=99), req("")):
            stream = r.client.stream(bad.prompt, adapter=bad.adapter, n=bad.sampling.n or 1)
            with pytest.raises(Exception, match=r"nobody|must be in|is empty"):
                await anext(stream)
        await serves_on(r)


async def test_count_tokens_refuses_no_input(tmp_path: Path) -> None:
    async with running(tmp_path) as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        stub = generation_stub(channel)
        error = await refused(stub.CountTokens(CountTokensRequest()))
        check(error, "INVALID_ARGUMENT", "EMPTY_PROMPT", "input")


METHODS = ["/loramux.v1.GenerationService/Generate", "/loramux.v1.GenerationService/GenerateStream"]
BAD_UTF8 = {
    METHODS[0]: b"\x12\x02\xff\xfe",  # prompt: two bytes that are no UTF-8
    METHODS[1]: b"\x0a\x04\x12\x02\xff\xfe",
}


@pytest.mark.parametrize("method", METHODS)
async def test_bytes_that_are_no_message(tmp_path: Path, method: str) -> None:
    """grpc.aio alone answers UNKNOWN with the Python exception's text."""
    async with running(tmp_path, adapters=("a",)) as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        for raw in (BAD_UTF8[method], b"\xff\xff\xff\xff", b"\x12\xff\xff\xff\xff\x0f"):
            streams = method.endswith("Stream")
            open_call: Any = channel.unary_stream if streams else channel.unary_unary
            call = open_call(method)(raw)
            error = await refused(anext(aiter(call)) if streams else call)
            check(error, "INVALID_ARGUMENT", "MALFORMED_MESSAGE", "request")
        await serves_on(r)


async def test_messages_that_are_too_large(tmp_path: Path) -> None:
    async with (
        running(tmp_path, adapters=("a",), max_message_bytes=100_000) as r,
        grpc.aio.insecure_channel(r.addresses.public) as channel,
    ):
        stub = generation_stub(channel)
        error = await refused(stub.Generate(req("x" * 150_000)))
        check(error, "INVALID_ARGUMENT", "MESSAGE_TOO_LARGE", "request")
        assert "100000" in str(error.details())
        # Beyond the hard cap gRPC's core answers before Python sees the message.
        error = await refused(stub.Generate(req("x" * 1_000_000)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await serves_on(r)


async def test_adapter_service_refuses_what_it_should(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_adapter(outside, "secret")
    root = tmp_path / "root"
    write_adapter(root, "broken", b"bad")
    write_adapter(root, "other", b"other content")
    (root / "link").symlink_to(outside / "secret")
    load, unload = adapters_pb2.LoadAdapterRequest, adapters_pb2.UnloadAdapterRequest
    unload_late = unload(name="a")
    unload_late.drain_timeout.FromSeconds(-1)
    cases: list[tuple[str, Message, str, str]] = [
        ("LoadAdapter", load(name="../a"), "INVALID_ARGUMENT", "INVALID_ADAPTER_NAME"),
        ("LoadAdapter", load(name="x", source=str(outside / "secret")), "PERMISSION_DENIED", "PATH_NOT_ALLOWED"),
        ("LoadAdapter", load(name="x", source="../outside/secret"), "PERMISSION_DENIED", "PATH_NOT_ALLOWED"),
        ("LoadAdapter", load(name="x", source="link"), "PERMISSION_DENIED", "PATH_NOT_ALLOWED"),
        ("LoadAdapter", load(name="missing"), "INVALID_ARGUMENT", "ADAPTER_FILES_MISSING"),
        ("LoadAdapter", load(name="broken"), "INVALID_ARGUMENT", "INVALID_ADAPTER"),
        ("LoadAdapter", load(name="a", source="other"), "ALREADY_EXISTS", "ADAPTER_EXISTS"),
        ("UnloadAdapter", unload(name="nobody"), "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        ("UnloadAdapter", unload_late, "INVALID_ARGUMENT", "INVALID_VALUE"),
        ("GetAdapter", adapters_pb2.GetAdapterRequest(name="nobody"), "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        ("UpdateAdapter", adapters_pb2.UpdateAdapterRequest(name="a"), "INVALID_ARGUMENT", "INVALID_VALUE"),
        (
            "UpdateAdapter",
            adapters_pb2.UpdateAdapterRequest(name="nobody", pinned=True),
            "NOT_FOUND",
            "ADAPTER_NOT_FOUND",
        ),
        ("ListAdapters", adapters_pb2.ListAdaptersRequest(page_token="?"), "INVALID_ARGUMENT", "INVALID_VALUE"),
    ]
    async with running(root, adapters=("a",)) as r, grpc.aio.insecure_channel(r.addresses.admin) as channel:
        stub = adapter_stub(channel)
        for method, request, code, reason in cases:
            try:
                check(await refused(getattr(stub, method)(request)), code, reason)
            except BaseException as failure:
                failure.add_note(f"the case: {method} {request}")
                raise
        merge = adapters_pb2.MergeAdapterRequest(name="a", output="out")
        error = await refused(anext(aiter(stub.MergeAdapter(merge))))
        check(error, "PERMISSION_DENIED", "MERGE_DIR_NOT_SET")
        await serves_on(r)


async def test_a_full_adapter_budget_asks_to_come_back(tmp_path: Path) -> None:
    for name, size in (("pinned", 300), ("next", 300), ("huge", 1000)):
        write_adapter(tmp_path, name, b"x" * size)
    async with running(tmp_path, budget=500) as r:
        await r.admin.load("pinned", pin=True)
        with pytest.raises(Overloaded) as caught:
            await r.admin.load("next")
        assert caught.value.reason == "ADAPTER_BUDGET_EXCEEDED"
        assert caught.value.retry_after is not None
        with pytest.raises(Overloaded) as caught:  # there will never be room for it
            await r.admin.load("huge")
        assert (caught.value.reason, caught.value.retry_after) == ("ADAPTER_BUDGET_EXCEEDED", None)

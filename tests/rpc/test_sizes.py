"""Too much of something: refused by its number, before it is parsed, copied or tokenized."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loramux.engine.door import Limits
from loramux.errors import InvalidRequest, Overloaded
from loramux.rpc import sizes, watchers, wire
from loramux.rpc.boundary import Boundary, Malformed
from loramux.rpc.tokenizing import Tokenizing
from loramux.v1 import adapters_pb2
from loramux.v1 import generation_pb2 as pb

from tests.rpc.stack import ByteTokens, running

LIMITS = Limits(vocab_size=260, max_context=256)
BOUNDS = sizes.bounds(LIMITS)
MANY = 100_000


def _knobs(**given: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(**given))


FLOODS: dict[str, tuple[str, Any]] = {
    "empty turns": ("chat.messages", pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * MANY))),
    "turns": ("chat.messages", pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")] * MANY))),
    "turns to count": ("chat.messages", pb.CountTokensRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * MANY))),
    "ids": ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * MANY))),
    "large ids": ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1] * MANY))),
    "ids to count": ("token_ids", pb.CountTokensRequest(token_ids=pb.TokenIds(ids=[1] * MANY))),
    "mix": ("mix", pb.GenerateRequest(mix=[pb.AdapterWeight(adapter=f"a{i}") for i in range(MANY)])),
    "empty mix": ("mix", pb.GenerateRequest(mix=[pb.AdapterWeight()] * MANY)),
    "merge": ("mix", adapters_pb2.MergeAdapterRequest(mix=[pb.AdapterWeight()] * MANY)),
    "stop": ("sampling.stop", _knobs(stop=["x"] * MANY)),
    "empty stop": ("sampling.stop", _knobs(stop=[""] * MANY)),
    "stop ids": ("sampling.stop_token_ids", _knobs(stop_token_ids=range(MANY))),
    "bias": ("sampling.logit_bias", _knobs(logit_bias=dict.fromkeys(range(MANY), 1.0))),
    "in a stream": (
        "chat.messages",
        pb.GenerateStreamRequest(request=pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * MANY))),
    ),
}
# What parses in protobuf as the last of many, or as nothing.
REPEATED: dict[str, bytes] = {
    "the same prompt again": b"\x12\x01x",
    "the same sampling again": b"\x3a\x00",
    "an unknown number": b"\xf8\x07\x01",
    "an unknown string": b"\xfa\x07\x00",
    "an unknown group": b"\xfb\x07\xfc\x07",
    "ids that are not packed": b"\x1a\x02\x08\x01",
}


def _behind_the_boundary(message: type[Any], limit: int = 4 << 20) -> Any:
    """The deserializer of a method that takes `message`, and fails if it is asked to parse."""

    class Unparsed:
        DESCRIPTOR = message.DESCRIPTOR

        @classmethod
        def FromString(cls, raw: bytes) -> Any:
            raise AssertionError("parsed")

    return Boundary(limit, BOUNDS, lambda error: None, lambda *refused: None)._deserializer(Unparsed.FromString)


@pytest.mark.parametrize(("field", "message"), FLOODS.values(), ids=FLOODS)
def test_many_items_are_counted_before_they_are_parsed(field: str, message: Any) -> None:
    """500,000 empty turns took 14 s and 5 GB before they were refused."""
    found = _behind_the_boundary(type(message))(message.SerializeToString())
    assert isinstance(found, Malformed)
    assert found.error.field == field
    assert found.error.metadata["limit"] in found.error.message


@pytest.mark.parametrize("again", REPEATED.values(), ids=REPEATED)
def test_what_protobuf_would_drop_is_counted_too(again: bytes) -> None:
    found = _behind_the_boundary(pb.GenerateRequest)(pb.GenerateRequest(prompt="x").SerializeToString() + again * MANY)
    assert isinstance(found, Malformed)
    assert found.error.reason in ("TOO_MANY_FIELDS", "PROMPT_TOO_LONG")


def test_what_is_allowed_is_taken_however_it_is_written() -> None:
    turns = [pb.ChatMessage(role="user", content="x" * 100)] * 256
    full = pb.GenerateRequest(
        request_id="r",
        chat=pb.Chat(messages=turns),
        mix=[pb.AdapterWeight(adapter=f"a{i}", weight=i) for i in range(8)],
        sampling=pb.SamplingParams(
            stop=["x"] * 16, stop_token_ids=range(64), logit_bias=dict.fromkeys(range(1024), 1.0), temperature=1
        ),
    )
    raw = full.SerializeToString()
    assert len(raw) > wire.SCANNED_FROM
    wire.check_counts(raw, pb.GenerateRequest.DESCRIPTOR, BOUNDS)
    sizes.check(full, LIMITS, BOUNDS)
    ids = b"\x08\x01" * 255  # field 1, not packed
    unpacked = b"\x1a" + bytes([len(ids) & 127 | 128, len(ids) >> 7]) + ids
    wire.check_counts(unpacked, pb.GenerateRequest.DESCRIPTOR, BOUNDS)
    assert len(pb.GenerateRequest.FromString(unpacked).token_ids.ids) == 255


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_bytes_that_are_no_message_are_left_to_protobuf(raw: bytes) -> None:
    try:
        wire.check_counts(raw, pb.GenerateRequest.DESCRIPTOR, BOUNDS)
    except InvalidRequest as error:
        assert error.field in {bound.name for bound in BOUNDS.values()}  # not in so few bytes: a number in few bytes
        assert len(raw) > 8


@pytest.mark.parametrize(("field", "message"), FLOODS.values(), ids=FLOODS)
def test_parsed_messages_are_counted_too(field: str, message: Any) -> None:
    """Other faces hand them over parsed, and small ones are not scanned."""
    if isinstance(message, pb.GenerateStreamRequest):
        message = message.request
    if isinstance(message, adapters_pb2.MergeAdapterRequest):
        return
    counts = isinstance(message, pb.CountTokensRequest)
    with pytest.raises(InvalidRequest) as caught:
        _ = sizes.check_input(message, BOUNDS) if counts else sizes.check(message, LIMITS, BOUNDS)
    assert caught.value.field == field


class Counted(ByteTokens):
    """Tokenizes in pieces of ten characters, each when it is told to."""

    def __init__(self) -> None:
        self.texts: list[int] = []
        self.pieces = 0
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.given_up = threading.Event()

    def encode(self, text: str, parse_special: bool = True, at_least: Any = None) -> list[int]:
        self.texts.append(len(text))
        try:
            for end in range(10, len(text), 10):
                self.begun.set()
                assert self.go_on.wait(60)
                self.pieces += 1
                at_least(end)
        except BaseException:
            self.given_up.set()
            raise
        return list(text.encode())


async def test_a_text_that_no_prompt_can_be_is_not_tokenized() -> None:
    tokens = Counted()
    tokenizing = Tokenizing(tokens, LIMITS)
    for message in (
        pb.GenerateRequest(prompt="x" * 1025),
        pb.CountTokensRequest(prompt="x" * 1025),
        pb.CountTokensRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x" * 600)] * 2)),
    ):
        with pytest.raises(InvalidRequest, match="takes prompts of at most 255") as caught:
            await tokenizing.ids(message)
        assert caught.value.reason == "PROMPT_TOO_LONG"
    assert tokens.texts == []
    tokenizing.close()


async def test_a_text_is_given_up_once_it_is_too_long() -> None:
    tokens = Counted()
    tokens.go_on.set()
    tokenizing = Tokenizing(tokens, LIMITS)
    with pytest.raises(InvalidRequest, match="260 tokens or more"):
        await tokenizing.ids(pb.GenerateRequest(prompt="x" * 1000))
    assert tokens.pieces == 26
    tokenizing.close()


async def test_a_text_is_given_up_with_its_caller() -> None:
    tokens = Counted()
    tokenizing = Tokenizing(tokens, LIMITS)
    caller = asyncio.create_task(tokenizing.ids(pb.GenerateRequest(prompt="x" * 200)))
    await asyncio.to_thread(tokens.begun.wait, 60)
    caller.cancel()
    await asyncio.wait([caller])
    tokens.go_on.set()
    assert await asyncio.to_thread(tokens.given_up.wait, 60)
    assert tokens.pieces == 1
    tokenizing.close()


async def test_short_texts_wait_for_no_long_one(tmp_path: Path) -> None:
    """Three callers of 0.8 MB, gone after half a second, held a two-letter prompt up for eight."""
    tokens = Counted()
    limits = Limits(vocab_size=260, max_context=100_000)
    tokenizing = Tokenizing(tokens, limits)
    long = [asyncio.create_task(tokenizing.ids(pb.GenerateRequest(prompt="x" * 20_000))) for _ in range(3)]
    await asyncio.to_thread(tokens.begun.wait, 60)
    assert await tokenizing.ids(pb.GenerateRequest(prompt="hi")) == [104, 105]
    for task in long:
        task.cancel()
    await asyncio.wait(long)
    tokens.go_on.set()
    assert await tokenizing.ids(pb.GenerateRequest(prompt="y" * 20_000)) == [121] * 20_000
    tokenizing.close()
    assert tokens.texts.count(20_000) == 2  # of those that left, only the one that had begun


async def test_the_shortest_text_is_the_next() -> None:
    """A flood of texts that are just not long was worked on before a word that came after it."""
    tokens = Counted()
    tokenizing = Tokenizing(tokens, LIMITS)
    calls = [asyncio.create_task(tokenizing.ids(pb.GenerateRequest(prompt="x" * 200)))]
    await asyncio.to_thread(tokens.begun.wait, 60)
    calls += [asyncio.create_task(tokenizing.ids(pb.GenerateRequest(prompt="x" * n))) for n in (90, 100, 2, 80)]
    await asyncio.sleep(0)  # each gets into the line
    tokens.go_on.set()
    await asyncio.gather(*calls)
    assert tokens.texts == [200, 2, 80, 90, 100]
    tokenizing.close()


async def test_closing_drops_what_waits() -> None:
    tokens = Counted()
    tokenizing = Tokenizing(tokens, LIMITS)
    calls = [asyncio.create_task(tokenizing.ids(pb.GenerateRequest(prompt="x" * 100)))]
    await asyncio.to_thread(tokens.begun.wait, 60)
    calls += [asyncio.create_task(tokenizing.ids(pb.GenerateRequest(prompt="x" * n))) for n in (90, 80)]
    await asyncio.sleep(0)
    tokenizing.close()
    tokens.go_on.set()
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in done] == [False, True, True]
    with pytest.raises(asyncio.CancelledError):
        await tokenizing.ids(pb.GenerateRequest(prompt="hi"))


async def test_messages_at_work_are_bounded_in_bytes(tmp_path: Path) -> None:
    """A thousand waiting requests of 4 MB each are 4 GB."""
    tokens = Counted()
    async with running(tmp_path, tokens=tokens, max_message_bytes=1100) as r:
        calls = [asyncio.create_task(r.client.count_tokens("x" * 1000)) for _ in range(80)]
        refused, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        error = refused.pop().exception()
        assert isinstance(error, Overloaded)
        assert (error.reason, error.metadata["limit"]) == ("QUEUE_FULL", str(64 * 1100))
        for call in waiting:
            call.cancel()
        await asyncio.wait(waiting)
        tokens.go_on.set()
        async with asyncio.timeout(60):
            while True:
                try:
                    assert await r.client.count_tokens("x" * 200) == 200
                    break
                except Overloaded:  # the server hears of the others' leaving a moment later
                    await asyncio.sleep(0.01)


async def test_watchers_are_bounded(tmp_path: Path) -> None:
    async with running(tmp_path) as r, grpc.aio.insecure_channel(r.addresses.admin) as channel:
        for method in ("/grpc.health.v1.Health/Watch", "/loramux.v1.AdapterService/WatchAdapters"):
            calls = [channel.unary_stream(method)(b"") for _ in range(watchers.MOST)]
            if "Health" in method:
                for call in calls:
                    await anext(aiter(call))
            else:
                async with asyncio.timeout(60):
                    while len(r.manager._watchers) < watchers.MOST:
                        await asyncio.sleep(0.01)
            with pytest.raises(grpc.aio.AioRpcError, match="streams watch already") as caught:
                await anext(aiter(channel.unary_stream(method)(b"")))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            for call in calls:
                call.cancel()


async def test_count_tokens_refuses_what_generate_refuses(tmp_path: Path) -> None:
    async with running(tmp_path) as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        methods = {
            "Generate": (channel.unary_unary("/loramux.v1.GenerationService/Generate"), pb.GenerateRequest),
            "CountTokens": (channel.unary_unary("/loramux.v1.GenerationService/CountTokens"), pb.CountTokensRequest),
        }
        for given_input in (
            {"prompt": "x" * 300},
            {"prompt": "x" * 100_000},
            {"prompt": ""},
            {},
            {"token_ids": pb.TokenIds(ids=[1] * 256)},
            {"token_ids": pb.TokenIds(ids=[9999])},
            {"token_ids": pb.TokenIds()},
            {"chat": pb.Chat()},
            {"chat": pb.Chat(messages=[pb.ChatMessage(role="tool", content="x")])},
            {"chat": pb.Chat(messages=[pb.ChatMessage(role="user", content="x")] * 257)},
            {"chat": pb.Chat(messages=[pb.ChatMessage(role="user", content="x" * 150)] * 2)},
        ):
            said = {}
            for name, (method, message) in methods.items():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await method(message(**given_input).SerializeToString())
                said[name] = caught.value.code().name, caught.value.details()
            assert said["Generate"] == said["CountTokens"]
            assert said["Generate"][0] == "INVALID_ARGUMENT"


async def test_count_tokens_has_a_place_in_the_queue_or_none(tmp_path: Path) -> None:
    tokens = Counted()
    async with running(tmp_path, tokens=tokens, max_queue=1) as r:
        first = asyncio.create_task(r.client.count_tokens("x" * 100))
        await asyncio.to_thread(tokens.begun.wait, 60)
        with pytest.raises(Overloaded) as caught:
            await r.client.count_tokens("hi")
        assert caught.value.reason == "QUEUE_FULL"
        tokens.go_on.set()
        assert await first == 100


async def test_a_client_that_leaves_frees_the_thread(tmp_path: Path) -> None:
    tokens = Counted()
    async with running(tmp_path, adapters=("a",), tokens=tokens) as r:
        call = asyncio.create_task(r.client.generate("x" * 100, adapter="a"))
        await asyncio.to_thread(tokens.begun.wait, 60)
        call.cancel()
        await asyncio.wait([call])
        async with asyncio.timeout(60):
            while r.registry.get("a").leases:  # the server hears of it a moment later
                await asyncio.sleep(0.01)
        tokens.go_on.set()
        assert await asyncio.to_thread(tokens.given_up.wait, 60)
        assert tokens.pieces == 1
        await r.settle()

"""The clients: sync and async, errors as the server raised them, arguments that cannot be sent."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from loramux.answers import Delta, Finished, Started
from loramux.client import AdminClient, AsyncAdminClient, AsyncClient, Client
from loramux.engine.request import Event, Request, RequestFailed
from loramux.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterUnavailable,
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineFault,
    InvalidAdapter,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    PathNotAllowed,
    SlowReader,
    Unimplemented,
    Unreachable,
)

from tests.patience import PATIENCE
from tests.rpc.stack import ByteTokens, endless, running

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work)


async def test_sync_clients_do_what_the_async_ones_do(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",)) as r:

        def work() -> None:
            with Client(r.addresses.public, timeout=PATIENCE) as client, AdminClient(r.addresses.admin) as admin:
                result = client.generate("hello", adapter="a", max_new_tokens=6, ignore_eos=True)
                events = list(client.stream("hello", adapter="a", max_new_tokens=6, ignore_eos=True))
                assert isinstance(events[0], Started)
                assert isinstance(events[-1], Finished)
                assert "".join(event.text for event in events) == result.text
                assert client.count_tokens("hello") == 5
                assert client.tokenize("hi") == [104, 105]
                assert client.model().vocab_size == 260
                assert [a.name for a in admin.list().adapters] == ["a"]
                assert admin.pin("a").pinned
                assert admin.get("a").state == "ready"
                watch = admin.watch()
                assert next(watch).name == "a"
                watch.close()
                assert admin.unload("a", drain_timeout=1).freed_bytes > 0
                assert admin.load("a").name == "a"
                with pytest.raises(AdapterNotFound):
                    client.generate("hello", adapter="nobody")
                with pytest.raises(AdapterNotFound):
                    next(client.stream("hello", adapter="nobody"))

        await in_thread(work)
        await r.settle()


async def test_closing_a_sync_stream_stops_the_work(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",), script=endless) as r:

        def work() -> None:
            with Client(r.addresses.public) as client:
                for event in client.stream("hello", adapter="a"):
                    if isinstance(event, Delta):
                        break

        await in_thread(work)
        await r.settle()


ERRORS: list[LoramuxError] = [
    InvalidRequest("sampling.n", "must be in [1, 16], got 99", metadata={"limit": 16}),
    InvalidAdapter("r", "does not fit"),
    AdapterUnavailable("it failed to load", metadata={"adapter": "a"}),
    AdapterNotFound("nobody"),
    AdapterExists("other content"),
    PathNotAllowed("outside the roots"),
    Overloaded("full", retry_after=2.5, reason="QUEUE_FULL"),
    Overloaded("the disk is full", retry_after=None, reason="DISK_FULL"),
    SlowReader("it did not read"),
    DeadlineExceeded("too late"),
    Cancelled("an operator did it"),
    Draining("going down", retry_after=0.5),
    Unimplemented("not yet"),
    EngineFault("it broke"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
async def test_errors_arrive_as_they_were_raised(tmp_path: Path, error: LoramuxError) -> None:
    async def fail(request: Request) -> AsyncIterator[Event]:
        yield RequestFailed(error)

    def same(caught: LoramuxError) -> None:
        assert (type(caught), caught.message, caught.reason) == (type(error), error.message, error.reason)
        assert caught.metadata == error.metadata | {"request_id": "mine"}
        assert getattr(caught, "retry_after", None) == getattr(error, "retry_after", None)

    async with running(tmp_path, script=fail) as r:
        with pytest.raises(LoramuxError) as caught:
            await r.client.generate("x", request_id="mine")
        same(caught.value)
        with pytest.raises(LoramuxError) as caught:
            async for _ in r.client.stream("x", request_id="mine"):
                pass
        same(caught.value)

        def sync() -> None:
            with Client(r.addresses.public) as client:
                with pytest.raises(LoramuxError) as caught:
                    client.generate("x", request_id="mine")
                same(caught.value)
                with pytest.raises(LoramuxError) as caught:
                    list(client.stream("x", request_id="mine"))
                same(caught.value)

        await in_thread(sync)


async def test_nobody_at_the_address() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unreachable, match=r"no server answers at 127\.0\.0\.1:1") as caught:
            await client.generate("x", timeout=5)
        assert caught.value.metadata == {"address": "127.0.0.1:1"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt": "x", "n": -1}, InvalidRequest),
        ({"prompt": "x", "n": "two"}, InvalidRequest),
        ({"prompt": "x", "seed": -1}, InvalidRequest),
        ({"prompt": "x", "logit_bias": {-1: 2.0}}, InvalidRequest),
        ({"prompt": "a\ud800"}, InvalidRequest),
        ({"token_ids": [-5]}, InvalidRequest),
        ({"token_ids": "abc"}, InvalidRequest),
        ({"token_ids": 5}, InvalidRequest),
        ({"prompt": [{"role": "user", "content": "x"}]}, InvalidRequest),
        ({"prompt": {"role": "user"}}, InvalidRequest),
        ({"prompt": 5}, InvalidRequest),
        ({"messages": "hi"}, InvalidRequest),
        ({"messages": 5}, InvalidRequest),
        ({"messages": {"role": "user", "content": "hi"}}, InvalidRequest),
        ({"prompt": "x", "adapter": ["a"]}, InvalidRequest),
        ({"prompt": "x", "mix": {"a": "much"}}, InvalidRequest),
        ({"prompt": "x", "mix": {5: 1.0}}, InvalidRequest),
        ({"prompt": "x", "mix": [("a", 1.0)]}, InvalidRequest),
        ({"prompt": "x", "mix": {}}, InvalidRequest),  # the base answered
        ({"prompt": "x", "stop": 5}, InvalidRequest),
        ({"prompt": "x", "temperature": [1]}, InvalidRequest),
        ({"prompt": "x", "logit_bias": [1]}, InvalidRequest),
        ({"prompt": "x", "stop_token_ids": {1: 2}}, InvalidRequest),
        ({}, TypeError),
        ({"prompt": "x", "token_ids": [1]}, TypeError),
        ({"prompt": "x", "temprature": 1}, TypeError),
    ],
)
async def test_what_no_message_can_hold_is_refused_before_it_is_sent(
    arguments: dict[str, Any], error: type[Exception]
) -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(error):
            await client.generate(**arguments)


ADMIN_CALLS: dict[str, tuple[str, Callable[[AdminClient], Any]]] = {
    "name": ("name", lambda client: client.load("a\udcff")),
    "name of another type": ("name", lambda client: client.load(["a"])),
    "source": ("source", lambda client: client.load("a", "a\udcff")),
    "pin": ("pin", lambda client: client.load("a", pin="maybe")),
    "get": ("name", lambda client: client.get("a\udcff")),
    "pinned": ("pinned", lambda client: client.pin("a", "maybe")),
    "unload": ("name", lambda client: client.unload("a\udcff")),
    "NaN": ("drain_timeout", lambda client: client.unload("a", drain_timeout=math.nan)),
    "for ever": ("drain_timeout", lambda client: client.unload("a", drain_timeout=math.inf)),
    "ages": ("drain_timeout", lambda client: client.unload("a", drain_timeout=1e300)),
    "soon": ("drain_timeout", lambda client: client.unload("a", drain_timeout="soon")),
    "output": ("output", lambda client: next(client.merge("a", output="a\udcff"))),
    "no mix": ("mix", lambda client: next(client.merge("a", output="a", mix={}))),
    "weight": ("mix[0].weight", lambda client: next(client.merge(output="a", mix={"a": "much"}))),
}


@pytest.mark.parametrize(("field", "call"), ADMIN_CALLS.values(), ids=ADMIN_CALLS)
def test_what_no_admin_message_can_hold_is_refused_by_name(field: str, call: Callable[[AdminClient], Any]) -> None:
    """The command line showed an "unexpected ValueError" or UnicodeEncodeError."""
    with AdminClient("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as caught:
        call(client)
    assert caught.value.field == field


@pytest.mark.parametrize("kind", [Client, AsyncClient, AdminClient, AsyncAdminClient])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tsl": True}, "there is no argument 'tsl'; did you mean 'tls'?"),
        ({"ca": b""}, "there is no argument 'ca'; there are api_key, root_certificates, timeout, tls"),
        ({"root_certificates": "ca.pem"}, "root_certificates takes the bytes of a PEM file"),
    ],
)
def test_a_client_takes_no_argument_that_it_would_ignore(
    kind: Callable[..., object], arguments: dict[str, Any], sentence: str
) -> None:
    """With a misspelt `tls` the token went over the network in plain text."""
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}"):
        kind("127.0.0.1:1", api_key="secret-token", **arguments)


def test_a_key_that_no_header_can_hold_is_not_shown() -> None:
    """gRPC's own error quotes it."""
    for key in ("secret\n", "s\u00e9cret", "secret\x00"):
        with pytest.raises(InvalidRequest, match=r"^api_key: must be of visible ASCII") as caught:
            Client("127.0.0.1:1", api_key=key)
        assert key not in caught.value.message


async def test_the_other_port_is_told_from_a_server_that_lacks_a_method(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        for kind, address in ((AsyncAdminClient, r.addresses.public), (AsyncClient, r.addresses.admin)):
            async with kind(address) as client:
                with pytest.raises(Unimplemented, match="its admin port has the adapters"):
                    await (client.get("a") if isinstance(client, AsyncAdminClient) else client.generate("x"))


TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("field", "turn"),
    [
        ("messages[1]", "hi"),
        ("messages[1]", None),
        ("messages[1].role", {"content": "hi"}),
        ("messages[1].content", {"role": "user"}),
        ("messages[1].content", {"role": "assistant", "content": None}),
        ("messages[1].tool_calls", {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}),
        ("messages[1].name", TURN | {"name": "Ann"}),
        ("messages[1].tool_call_id", {"role": "tool", "content": "4", "tool_call_id": "1"}),
        ("messages[1].role", TURN | {"role": 5}),
        ("messages[1].role", TURN | {"role": "a\ud800"}),
        ("messages[1].content", TURN | {"content": 5}),
        ("messages[1].content", TURN | {"content": b"hi"}),
        ("messages[1].content", TURN | {"content": {"type": "text", "text": "hi"}}),
        ("messages[1].content", TURN | {"content": "a\ud800"}),
        ("messages[1].content[1]", TURN | {"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}),
        ("messages[1].content[0]", TURN | {"content": [{"type": "input_audio", "input_audio": {}}]}),
        ("messages[1].content[0]", TURN | {"content": [{"text": "a"}]}),
        ("messages[1].content[0]", TURN | {"content": [None]}),
        ("messages[1].content[0].text", TURN | {"content": [{"type": "text"}]}),
        ("messages[1].content[0].text", TURN | {"content": [{"type": "text", "text": 5}]}),
        ("messages[1].content[0].x", TURN | {"content": [{"type": "text", "text": "", "x": 1}]}),
    ],
)
async def test_turns_that_cannot_be_sent_are_refused_by_name(field: str, turn: Any) -> None:
    """They were a KeyError, a TypeError, or sent without what was left out."""
    async with AsyncClient("127.0.0.1:1") as client:
        for call in (client.generate(messages=[TURN, turn]), client.count_tokens(messages=[TURN, turn])):
            with pytest.raises(InvalidRequest) as caught:
                await call
            assert caught.value.field == field
            assert (
                caught.value.description.startswith(("must be", "is ")) or "cannot be sent" in caught.value.description
            )


async def test_turns_as_openai_has_them(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
        turn = {"role": "user", "content": parts, "name": None, "tool_calls": None, "annotations": []}
        assert (await r.client.generate(messages=[turn])).text == (await r.client.generate(messages=[TURN])).text
        assert await r.client.count_tokens(messages=[turn]) == 8
        with pytest.raises(InvalidRequest, match="must be one of system, user, assistant, got 'tool'"):
            await r.client.generate(messages=[TURN | {"role": "tool"}])
        with pytest.raises(InvalidRequest, match="goes as system"):
            await r.client.generate(messages=[TURN | {"role": "developer"}])


async def test_parse_special_reaches_the_tokenizer(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watched(ByteTokens):
        def encode(self, text: str, parse_special: bool = True, *how: Any) -> list[int]:
            seen.append(parse_special)
            return super().encode(text)

    async with running(tmp_path, tokens=Watched()) as r:
        for given in ({}, {"parse_special": None}, {"parse_special": True}, {"parse_special": False}):
            await r.client.generate("hi", **given)
            await r.client.count_tokens("hi", **given)
            await r.client.tokenize("hi", **given)
    assert seen == [True] * 9 + [False] * 3


async def test_every_argument_reaches_the_engine(tmp_path: Path) -> None:
    async with running(tmp_path, script=endless) as r:
        stream = r.client.stream(
            token_ids=[1, 2],
            cache_salt="salt",
            priority=-3,
            max_new_tokens=9,
            min_new_tokens=2,
            temperature=0.5,
            top_k=4,
            top_p=0.75,
            min_p=0.25,
            seed=2**63,
            n=2,
            repetition_penalty=1.5,
            frequency_penalty=0.5,
            presence_penalty=-0.5,
            logit_bias={7: -100.0},
            stop="END",
            stop_token_ids=[3, 4],
            ignore_eos=True,
            top_logprobs=2,
        )
        await anext(stream)
        request = r.engine.seen[0]
        assert (request.prompt_ids, request.cache_salt, request.priority) == ((1, 2), "salt", -3)
        s = request.sampling
        assert (s.max_new_tokens, s.min_new_tokens, s.temperature, s.top_k, s.top_p, s.min_p) == (
            9,
            2,
            0.5,
            4,
            0.75,
            0.25,
        )
        assert (s.seed, s.n, s.repetition_penalty) == (2**63, 2, 1.5)
        assert (s.frequency_penalty, s.presence_penalty, s.logit_bias) == (0.5, -0.5, {7: -100.0})
        assert (s.stop, s.stop_token_ids, s.ignore_eos) == (("END",), frozenset({3, 4}), True)
        assert (s.logprobs, s.top_logprobs) == (True, 2)
        await stream.aclose()


def test_import_is_quick_and_light() -> None:
    """A client on a laptop does not pay for torch."""
    code = (
        "import sys, loramux.client; "
        "heavy = {m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy', 'tokenizers'}; "
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('loramux.')} & "
        "{'engine', 'lora', 'model', 'ops', 'config'}; "
        "assert not heavy | rooms, (heavy, rooms)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_the_face_imports_no_torch() -> None:
    code = (
        "import sys, loramux.rpc.server, loramux.config, loramux.metrics, loramux.http.metrics_server; "
        "assert not {m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


async def test_threads_share_a_client(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",)) as r:

        def work() -> None:
            texts: list[str] = []
            with Client(r.addresses.public, timeout=PATIENCE) as client:

                def one() -> None:
                    texts.append(client.generate("hello", adapter="a", max_new_tokens=4).text)

                threads = [threading.Thread(target=one) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            assert len(texts) == 8
            assert len(set(texts)) == 1

        await in_thread(work)

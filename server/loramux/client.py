"""Clients of a loramux server, sync and async.

    from loramux.client import Client

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Order: 3 apples, 2 pears.", adapter="records", max_new_tokens=64).text)
        for event in client.stream("Once upon a time", temperature=0.8, seed=7):
            print(event.text, end="", flush=True)

    async with AsyncClient("127.0.0.1:50051") as client:
        result = await client.generate(messages=[{"role": "user", "content": "Hello"}], mix={"a": 0.5, "b": 0.5})

    with AdminClient("127.0.0.1:50052") as admin:
        admin.load("records", pin=True)

Errors are those of `loramux.errors`, as the server raised them; Unreachable if none answers. Every method takes a
`timeout` in seconds, which the server keeps too (DeadlineExceeded, and the work stops). Without one, the client's is
used; without that, there is none. Imports no torch.
"""

# ruff: noqa: ASYNC109 - a timeout here is the deadline that travels to the server

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, Unpack

from loramux import messages
from loramux.answers import (
    Adapter,
    AdapterList,
    ChatTurn,
    Completion,
    Delta,
    Finished,
    Generation,
    Merged,
    Merging,
    Model,
    Result,
    Sampling,
    Started,
    StreamEvent,
    Timings,
    TokenLogprob,
    Unloaded,
    Usage,
    UsedAdapter,
)
from loramux.links import AsyncLink, Connection, SyncLink
from loramux.messages import count_tokens_request
from loramux.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc

__all__ = [
    "Adapter",
    "AdapterList",
    "AdminClient",
    "AsyncAdminClient",
    "AsyncClient",
    "ChatTurn",
    "Client",
    "Completion",
    "Connection",
    "Delta",
    "Finished",
    "Generation",
    "Merged",
    "Merging",
    "Model",
    "Result",
    "Sampling",
    "Started",
    "StreamEvent",
    "Timings",
    "TokenLogprob",
    "Unloaded",
    "Usage",
    "UsedAdapter",
]

PUBLIC = "127.0.0.1:50051"
ADMIN = "127.0.0.1:50052"


class Client(SyncLink):
    """Generates, with any adapter of the server. Threads may share it."""

    def __init__(self, address: str = PUBLIC, **how: Unpack[Connection]) -> None:
        super().__init__(address, how)
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)

    def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **request: Unpack[Generation]
    ) -> Result:
        """The whole answer."""
        message = messages.generate_request(prompt, request)
        return messages.result(self._call(self._stub.Generate, message, timeout))

    def stream(
        self, prompt: str | None = None, *, timeout: float | None = None, **request: Unpack[Generation]
    ) -> Generator[StreamEvent, None, None]:
        """The answer as it is generated: Started, Deltas, and one Finished for each sequence.

        Every event has a `text`; together they are the answer (of `n` sequences, look at `index`). The request is
        sent when the first event is asked for; closing the generator stops the work.
        """
        message = generation_pb2.GenerateStreamRequest(request=messages.generate_request(prompt, request))
        return self._stream(self._stub.GenerateStream, message, timeout, messages.stream_event)

    def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[ChatTurn] | None = None,
        parse_special: bool | None = None,
        timeout: float | None = None,
    ) -> int:
        """How many tokens a prompt or a conversation takes; raises what `generate` does for one that is too long."""
        message = count_tokens_request(prompt, messages, parse_special)
        counted = self._call(self._stub.CountTokens, message, timeout)
        return int(counted.tokens)

    def tokenize(self, prompt: str, *, parse_special: bool | None = None, timeout: float | None = None) -> list[int]:
        """The ids of a prompt."""
        message = count_tokens_request(prompt, None, parse_special)
        return list(self._call(self._stub.CountTokens, message, timeout).token_ids)

    def model(self, *, timeout: float | None = None) -> Model:
        """The base model and the server's limits."""
        message = generation_pb2.GetModelRequest()
        return messages.model(self._call(self._stub.GetModel, message, timeout))


class AsyncClient(AsyncLink):
    """Generates, with any adapter of the server. Tasks of one event loop may share it."""

    def __init__(self, address: str = PUBLIC, **how: Unpack[Connection]) -> None:
        super().__init__(address, how)
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **request: Unpack[Generation]
    ) -> Result:
        """The whole answer."""
        message = messages.generate_request(prompt, request)
        return messages.result(await self._call(self._stub.Generate, message, timeout))

    def stream(
        self, prompt: str | None = None, *, timeout: float | None = None, **request: Unpack[Generation]
    ) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is generated: Started, Deltas, and one Finished for each sequence.

        Every event has a `text`; together they are the answer (of `n` sequences, look at `index`). The request is
        sent when the first event is asked for; closing the generator stops the work.
        """
        message = generation_pb2.GenerateStreamRequest(request=messages.generate_request(prompt, request))
        return self._stream(self._stub.GenerateStream, message, timeout, messages.stream_event)

    async def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[ChatTurn] | None = None,
        parse_special: bool | None = None,
        timeout: float | None = None,
    ) -> int:
        """How many tokens a prompt or a conversation takes; raises what `generate` does for one that is too long."""
        message = count_tokens_request(prompt, messages, parse_special)
        counted = await self._call(self._stub.CountTokens, message, timeout)
        return int(counted.tokens)

    async def tokenize(
        self, prompt: str, *, parse_special: bool | None = None, timeout: float | None = None
    ) -> list[int]:
        """The ids of a prompt."""
        message = count_tokens_request(prompt, None, parse_special)
        return list((await self._call(self._stub.CountTokens, message, timeout)).token_ids)

    async def model(self, *, timeout: float | None = None) -> Model:
        """The base model and the server's limits."""
        message = generation_pb2.GetModelRequest()
        return messages.model(await self._call(self._stub.GetModel, message, timeout))


class AdminClient(SyncLink):
    """Loads, unloads, pins and watches adapters, on the admin port. Threads may share it."""

    def __init__(self, address: str = ADMIN, **how: Unpack[Connection]) -> None:
        super().__init__(address, how)
        self._stub: Any = adapters_pb2_grpc.AdapterServiceStub(self._channel)

    def load(
        self,
        name: str,
        source: str = "",
        *,
        replace: bool = False,
        pin: bool = False,
        validate_only: bool = False,
        timeout: float | None = None,
    ) -> Adapter:
        """Load the folder `source` of the server's roots (empty: the folder `name`); returns when it is ready."""
        message = messages.load_request(name, source, replace, pin, validate_only)
        return messages.adapter(self._call(self._stub.LoadAdapter, message, timeout).adapter)

    def unload(
        self,
        name: str,
        *,
        drain_timeout: float | None = None,
        cancel_after_timeout: bool = False,
        timeout: float | None = None,
    ) -> Unloaded:
        """Take the name away, let running requests finish (at most `drain_timeout` seconds), free the memory."""
        message = messages.unload_request(name, drain_timeout, cancel_after_timeout)
        done = self._call(self._stub.UnloadAdapter, message, timeout)
        return Unloaded(done.freed_bytes, done.cancelled_requests)

    def get(self, name: str, *, timeout: float | None = None) -> Adapter:
        """One adapter."""
        message = messages.filled(adapters_pb2.GetAdapterRequest(), name=name)
        return messages.adapter(self._call(self._stub.GetAdapter, message, timeout).adapter)

    def list(self, *, timeout: float | None = None) -> AdapterList:
        """All adapters, by name."""
        message = adapters_pb2.ListAdaptersRequest()
        adapters: list[Adapter] = []
        while True:
            page = self._call(self._stub.ListAdapters, message, timeout)
            adapters += map(messages.adapter, page.adapters)
            if not page.next_page_token:
                return messages.adapter_list(page, adapters)
            message.page_token = page.next_page_token

    def pin(self, name: str, pinned: bool = True, *, timeout: float | None = None) -> Adapter:
        """Pin an adapter, so that it is never evicted, or unpin it."""
        message = messages.filled(adapters_pb2.UpdateAdapterRequest(), name=name, pinned=pinned)
        return messages.adapter(self._call(self._stub.UpdateAdapter, message, timeout).adapter)

    def merge(
        self,
        name: str = "",
        *,
        output: str,
        dtype: str = "bf16",
        mix: Mapping[str, float] | None = None,
        timeout: float | None = None,
    ) -> Generator[Merging | Merged, None, None]:
        """Write base + adapter, or a mix of several, as a dense model into the new folder `output` of the server.

        Mergings as it goes, then one Merged. Closing the generator before that ends the merge and leaves nothing.
        """
        message = messages.merge_request(name, output, dtype, mix)
        return self._stream(self._stub.MergeAdapter, message, timeout, messages.merging)

    def watch(self, *, timeout: float | None = None) -> Generator[Adapter, None, None]:
        """Every adapter as it is now, then each one that changes, until the server stops or this is closed."""
        message = adapters_pb2.WatchAdaptersRequest()
        return self._stream(self._stub.WatchAdapters, message, timeout, _watched)


class AsyncAdminClient(AsyncLink):
    """Loads, unloads, pins and watches adapters, on the admin port. Tasks of one event loop may share it."""

    def __init__(self, address: str = ADMIN, **how: Unpack[Connection]) -> None:
        super().__init__(address, how)
        self._stub: Any = adapters_pb2_grpc.AdapterServiceStub(self._channel)

    async def load(
        self,
        name: str,
        source: str = "",
        *,
        replace: bool = False,
        pin: bool = False,
        validate_only: bool = False,
        timeout: float | None = None,
    ) -> Adapter:
        """Load the folder `source` of the server's roots (empty: the folder `name`); returns when it is ready."""
        message = messages.load_request(name, source, replace, pin, validate_only)
        return messages.adapter((await self._call(self._stub.LoadAdapter, message, timeout)).adapter)

    async def unload(
        self,
        name: str,
        *,
        drain_timeout: float | None = None,
        cancel_after_timeout: bool = False,
        timeout: float | None = None,
    ) -> Unloaded:
        """Take the name away, let running requests finish (at most `drain_timeout` seconds), free the memory."""
        message = messages.unload_request(name, drain_timeout, cancel_after_timeout)
        done = await self._call(self._stub.UnloadAdapter, message, timeout)
        return Unloaded(done.freed_bytes, done.cancelled_requests)

    async def get(self, name: str, *, timeout: float | None = None) -> Adapter:
        """One adapter."""
        message = messages.filled(adapters_pb2.GetAdapterRequest(), name=name)
        return messages.adapter((await self._call(self._stub.GetAdapter, message, timeout)).adapter)

    async def list(self, *, timeout: float | None = None) -> AdapterList:
        """All adapters, by name."""
        message = adapters_pb2.ListAdaptersRequest()
        adapters: list[Adapter] = []
        while True:
            page = await self._call(self._stub.ListAdapters, message, timeout)
            adapters += map(messages.adapter, page.adapters)
            if not page.next_page_token:
                return messages.adapter_list(page, adapters)
            message.page_token = page.next_page_token

    async def pin(self, name: str, pinned: bool = True, *, timeout: float | None = None) -> Adapter:
        """Pin an adapter, so that it is never evicted, or unpin it."""
        message = messages.filled(adapters_pb2.UpdateAdapterRequest(), name=name, pinned=pinned)
        return messages.adapter((await self._call(self._stub.UpdateAdapter, message, timeout)).adapter)

    def merge(
        self,
        name: str = "",
        *,
        output: str,
        dtype: str = "bf16",
        mix: Mapping[str, float] | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[Merging | Merged, None]:
        """Write base + adapter, or a mix of several, as a dense model into the new folder `output` of the server.

        Mergings as it goes, then one Merged. Closing the generator before that ends the merge and leaves nothing.
        """
        message = messages.merge_request(name, output, dtype, mix)
        return self._stream(self._stub.MergeAdapter, message, timeout, messages.merging)

    def watch(self, *, timeout: float | None = None) -> AsyncGenerator[Adapter, None]:
        """Every adapter as it is now, then each one that changes, until the server stops or this is closed."""
        message = adapters_pb2.WatchAdaptersRequest()
        return self._stream(self._stub.WatchAdapters, message, timeout, _watched)


def _watched(message: adapters_pb2.WatchAdaptersResponse) -> Adapter:
    return messages.adapter(message.adapter)

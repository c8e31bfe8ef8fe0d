"""What every client stands on: a channel, a token, default timeouts, and the translation of errors.

Knows nothing of the services.
"""

# ruff: noqa: ASYNC109 - a timeout here is the deadline that travels to the server

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar

import grpc
import grpc.aio

from loramux import errors
from loramux.arguments import check_names
from loramux.rpc import status

T = TypeVar("T")


class Connection(TypedDict, total=False):
    """How to connect. `timeout`: seconds, for calls that are given none. `tls` trusts the machine's authorities,
    or those in `root_certificates`: the bytes of a PEM file."""

    api_key: str | None
    timeout: float | None
    tls: bool
    root_certificates: bytes | None


class Link:
    """What the four clients share: an address, a token, a default timeout, and the translation of errors.

    Raises TypeError for an argument that Connection does not have: ignored, a misspelt `tls` would send the token in
    plain text.
    """

    def __init__(self, address: str, how: Connection) -> None:
        check_names(how, Connection.__annotations__)
        self.address = address
        self._timeout = how.get("timeout")
        key = how.get("api_key")
        if key and not (key.isascii() and key.isprintable()):  # gRPC would show it in its own error
            raise errors.InvalidRequest("api_key", "must be of visible ASCII characters; a header can hold no others")
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        roots = how.get("root_certificates")
        if not isinstance(roots, bytes | None):
            got = type(roots).__name__
            raise TypeError(f"root_certificates takes the bytes of a PEM file (Path(...).read_bytes()), got {got}")
        self._credentials = grpc.ssl_channel_credentials(roots) if how.get("tls") or roots else None
        self._options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.keepalive_time_ms", 30_000),  # a server whose machine is gone is noticed
            ("grpc.keepalive_timeout_ms", 20_000),
        ]

    def _how(self, timeout: float | None) -> dict[str, Any]:
        return {"timeout": self._timeout if timeout is None else timeout, "metadata": self._metadata}

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """RpcErrors become the errors that the server raised."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._translate(error) from None

    def _translate(self, error: Any) -> errors.LoramuxError:
        details = dict(error.trailing_metadata() or ()).get(status.DETAILS_KEY)
        found = status.to_error(error.code(), error.details() or "", details)
        if isinstance(found, errors.Unreachable):
            return errors.Unreachable(
                f"no server answers at {self.address}: {found.message}", metadata={"address": self.address}
            )
        if isinstance(found, errors.Unimplemented) and details is None:  # gRPC's own answer
            return errors.Unimplemented(
                f"what answers at {self.address} serves no such method; a server's public port generates, its admin "
                "port has the adapters",
                metadata={"address": self.address},
            )
        return found


class SyncLink(Link):
    """A blocking channel; a context manager."""

    def __init__(self, address: str, how: Connection) -> None:
        super().__init__(address, how)
        if self._credentials is not None:
            self._channel = grpc.secure_channel(address, self._credentials, self._options)
        else:
            self._channel = grpc.insecure_channel(address, self._options)

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        with self._translated():
            return method(request, **self._how(timeout))

    def _stream(
        self, method: Any, request: Any, timeout: float | None, parse: Callable[[Any], T]
    ) -> Generator[T, None, None]:
        call = method(request, **self._how(timeout))
        try:
            with self._translated():
                yield from map(parse, call)
        finally:
            call.cancel()  # who stops iterating wants no more; after the end this does nothing


class AsyncLink(Link):
    """An asyncio channel; an asynchronous context manager."""

    def __init__(self, address: str, how: Connection) -> None:
        super().__init__(address, how)
        if self._credentials is not None:
            self._channel = grpc.aio.secure_channel(address, self._credentials, self._options)
        else:
            self._channel = grpc.aio.insecure_channel(address, self._options)

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        with self._translated():
            return await method(request, **self._how(timeout))

    async def _stream(
        self, method: Any, request: Any, timeout: float | None, parse: Callable[[Any], T]
    ) -> AsyncGenerator[T, None]:
        call = method(request, **self._how(timeout))
        try:
            with self._translated():
                async for message in call:
                    yield parse(message)
        finally:
            call.cancel()

"""The outermost interceptor: whatever happens inside, the caller gets a status from the one table.

- A message that is not protobuf, holds invalid UTF-8 or exceeds `max_message_bytes` becomes INVALID_ARGUMENT
  (grpc.aio alone answers UNKNOWN with the exception's text). So does one that holds more items than are allowed,
  before it is parsed: that happens on the event loop. Beyond `hard_cap(max_message_bytes)` gRPC's core
  refuses the message before Python sees it: RESOURCE_EXHAUSTED without details.
- A LoramuxError becomes its status; any other exception is logged and becomes INTERNAL without its text.
- Every error carries the request's id, see `request_ids`.

Knows nothing of what the services do. Handlers are coroutines; streams are written with `context.write`.
Streams of requests (reflection) pass unchanged: none is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from loramux.errors import EngineFault, InvalidRequest, LoramuxError, Overloaded
from loramux.rpc import request_ids, status, wire

log = logging.getLogger(__name__)

_HELD_MESSAGES = 64  # of the largest size: so many bytes of messages may be worked on at once

# In quotes, because gRPC's classes are generic for type checkers only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"
OnError: TypeAlias = Callable[[LoramuxError], None]
OnRefusal: TypeAlias = Callable[[str, str, LoramuxError], None]  # method, request's id, error


@dataclass(frozen=True, slots=True)
class Malformed:
    """What the deserializer returns in place of a message that cannot be taken: raising there is too early.

    `request_id` is what the message calls itself, as far as that can be read.
    """

    error: InvalidRequest
    request_id: str = ""


def hard_cap(max_message_bytes: int) -> int:
    """Bytes beyond which gRPC's core refuses a message itself. Twice the limit, so that most get a reason."""
    return 2 * max_message_bytes


async def abort(context: Context, error: LoramuxError, request_id: str) -> NoReturn:
    """End the RPC with the error's status and details, and the request's id in both trailers."""
    rich = status.from_error(error, request_id)
    trailer: tuple[tuple[str, str | bytes], ...] = ((status.DETAILS_KEY, rich.SerializeToString()),)
    if request_id.isascii() and request_id.isprintable():  # all that a header may hold
        trailer += ((request_ids.HEADER, request_id),)
    await context.abort(status.code_of(rich), rich.message, trailer)
    raise AssertionError("abort returned")


class Boundary(grpc.aio.ServerInterceptor):
    """See the module. Both callbacks are for the metrics: `on_error` is told of what ends an RPC; `on_refusal`, which
    gets the method and the request's id too, of what kept an RPC from its handler.
    """

    def __init__(self, max_message_bytes: int, bounds: wire.Bounds, on_error: OnError, on_refusal: OnRefusal) -> None:
        self._limit = max_message_bytes
        self._bounds = bounds
        self._held_bytes = 0  # of the messages that are worked on
        self._most_held_bytes = _HELD_MESSAGES * max_message_bytes
        self._on_error = on_error
        self._on_refusal = on_refusal

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler  # type: ignore[no-any-return]
        method = handler_call_details.method
        deserialize = self._deserializer(handler.request_deserializer)
        if not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(
                self._guarded(method, handler.unary_unary), deserialize, _serializer(handler.response_serializer)
            )
        return grpc.unary_stream_rpc_method_handler(
            self._guarded(method, handler.unary_stream), deserialize, handler.response_serializer
        )

    def _deserializer(self, parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        # `parse` is the class method FromString of the message's class.
        message: Descriptor | None = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)

        def deserialize(raw: bytes) -> Any:
            try:
                return self._parsed(raw, parse, message)
            except InvalidRequest as error:
                return Malformed(error, request_ids.find(raw, message))

        return deserialize

    def _parsed(self, raw: bytes, parse: Callable[[bytes], Any] | None, message: Descriptor | None) -> Any:
        """Raises InvalidRequest."""
        if len(raw) > self._limit:
            raise InvalidRequest(
                "request",
                f"the message has {len(raw)} bytes; at most {self._limit} are allowed",
                reason="MESSAGE_TOO_LARGE",
                metadata={"limit": self._limit, "given": len(raw)},
            )
        if len(raw) > wire.SCANNED_FROM and message is not None:
            wire.check_counts(raw, message, self._bounds)
        try:
            return parse(raw) if parse is not None else raw
        except (DecodeError, ValueError):
            raise InvalidRequest(
                "request",
                "the message is not protobuf of this method, or a string in it is not valid UTF-8",
                reason="MALFORMED_MESSAGE",
            ) from None

    def _guarded(self, method: str, behavior: Callable[[Any, Context], Awaitable[Any]]) -> Callable[..., Any]:
        async def call(request: Any, context: Context) -> Any:
            request_id = request_ids.begin(request, context.invocation_metadata())
            nbytes = 0 if isinstance(request, Malformed) else request.ByteSize()
            refusal = request.error if isinstance(request, Malformed) else self._without_room(nbytes)
            if refusal is not None:
                self._on_refusal(method, request_id, refusal)
                await abort(context, refusal, request_id)
            self._held_bytes += nbytes
            try:
                return await behavior(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await self._end(method, request_id, error, context)
            finally:
                self._held_bytes -= nbytes

        return call

    def _without_room(self, nbytes: int) -> Overloaded | None:
        """The refusal of a message, if those that are worked on, each of which stays in memory, have too many bytes."""
        if self._held_bytes + nbytes <= self._most_held_bytes:
            return None
        return Overloaded(
            f"requests of {self._held_bytes} bytes are worked on already; try again",
            reason="QUEUE_FULL",
            metadata={"limit": self._most_held_bytes, "given": nbytes},
        )

    async def _end(self, method: str, request_id: str, error: Exception, context: Context) -> NoReturn:
        if not isinstance(error, LoramuxError):
            log.error("%s failed on request %r", method, request_id, exc_info=error)
            error = EngineFault(status.OPAQUE)
        self._on_error(error)
        await abort(context, error, request_id)


def _serializer(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Answers that come as bytes are serialized already."""
    return lambda answer: answer if isinstance(answer, bytes) or serialize is None else serialize(answer)

"""The outermost interceptor: whatever happens inside, the caller gets a status from the one table.

- A message that is not protobuf, holds invalid UTF-8 or exceeds `max_message_bytes` becomes INVALID_ARGUMENT
  (grpc.aio alone answers UNKNOWN with the exception's text). So does one that holds more items than are allowed,
  before it is parsed: that happens on the event loop. Beyond `hard_cap(max_message_bytes)` gRPC's core
  refuses the message before Python sees it: RESOURCE_EXHAUSTED without details.
- A LoramuxError becomes its status; any other exception is logged and becomes INTERNAL without its text.

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
from google.protobuf.message import DecodeError

from loramux.errors import EngineFault, InvalidRequest, LoramuxError
from loramux.rpc import status, wire

log = logging.getLogger(__name__)

# In quotes, because gRPC's classes are generic for type checkers only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


@dataclass(frozen=True, slots=True)
class Malformed:
    """What the deserializer returns in place of a message that cannot be taken: raising there is too early."""

    error: InvalidRequest


def hard_cap(max_message_bytes: int) -> int:
    """Bytes beyond which gRPC's core refuses a message itself. Twice the limit, so that most get a reason."""
    return 2 * max_message_bytes


async def abort(context: Context, error: LoramuxError) -> NoReturn:
    """End the RPC with the error's status and details."""
    rich = status.from_error(error)
    trailer = ((status.DETAILS_KEY, rich.SerializeToString()),)
    await context.abort(status.code_of(rich), rich.message, trailer)
    raise AssertionError("abort returned")


class Boundary(grpc.aio.ServerInterceptor):
    """See the module. `on_error` is told of every error that ends an RPC (for the metrics)."""

    def __init__(self, max_message_bytes: int, bounds: wire.Bounds, on_error: Callable[[LoramuxError], None]) -> None:
        self._limit = max_message_bytes
        self._bounds = bounds
        self._on_error = on_error

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
                self._guarded(method, handler.unary_unary), deserialize, handler.response_serializer
            )
        return grpc.unary_stream_rpc_method_handler(
            self._guarded(method, handler.unary_stream), deserialize, handler.response_serializer
        )

    def _deserializer(self, parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        # `parse` is the class method FromString of the message's class.
        message = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)

        def deserialize(raw: bytes) -> Any:
            if len(raw) > self._limit:
                return Malformed(
                    InvalidRequest(
                        "request",
                        f"the message has {len(raw)} bytes; at most {self._limit} are allowed",
                        reason="MESSAGE_TOO_LARGE",
                        metadata={"limit": self._limit, "given": len(raw)},
                    )
                )
            try:
                if len(raw) > wire.SCANNED_FROM and message is not None:
                    wire.check_counts(raw, message, self._bounds)
                return parse(raw) if parse is not None else raw
            except InvalidRequest as error:
                return Malformed(error)
            except (DecodeError, ValueError):
                return Malformed(
                    InvalidRequest(
                        "request",
                        "the message is not protobuf of this method, or a string in it is not valid UTF-8",
                        reason="MALFORMED_MESSAGE",
                    )
                )

        return deserialize

    def _guarded(self, method: str, behavior: Callable[[Any, Context], Awaitable[Any]]) -> Callable[..., Any]:
        async def call(request: Any, context: Context) -> Any:
            try:
                self._refuse_malformed(request)
                return await behavior(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await self._end(method, error, context)

        return call

    @staticmethod
    def _refuse_malformed(request: Any) -> None:
        if isinstance(request, Malformed):
            raise request.error

    async def _end(self, method: str, error: Exception, context: Context) -> NoReturn:
        if not isinstance(error, LoramuxError):
            log.error("%s failed", method, exc_info=error)
            error = EngineFault(status.OPAQUE)
        self._on_error(error)
        await abort(context, error)

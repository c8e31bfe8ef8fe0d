"""Bearer tokens: who may call a port at all.

One interceptor a port. A port without a key is open. The health service is always open, so that probes need
no secret; reflection is not. Comparison takes the same time wherever a token differs. Knows nothing of what is
called.
"""

from __future__ import annotations

import hmac
from typing import Any

import grpc
import grpc.aio

from loramux.errors import LoramuxError, Unauthenticated, WrongScope
from loramux.rpc import request_ids
from loramux.rpc.boundary import Context, Continuation, Handler, OnRefusal, abort

_OPEN = ("/grpc.health.v1.Health/",)


class BearerAuth(grpc.aio.ServerInterceptor):
    """Lets calls pass that carry `authorization: Bearer <key>`.

    `other_key` is the other port's key: who presents it is known, but on the wrong port (PERMISSION_DENIED).
    `on_refusal` is told of every refusal: the method, the request's id, the error.
    """

    def __init__(
        self,
        key: str | None,
        *,
        scope: str,
        other_key: str | None,
        on_refusal: OnRefusal,
    ) -> None:
        self._key = key
        self._on_refusal = on_refusal
        self._scope = scope
        self._other_key = other_key

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler: Any = await continuation(handler_call_details)
        if self._key is None or handler is None or handler_call_details.method.startswith(_OPEN):
            return handler  # type: ignore[no-any-return]
        refusal = self._refusal(self._key, handler_call_details.invocation_metadata)
        if refusal is None:
            return handler  # type: ignore[no-any-return]
        request_id = request_ids.begin(None, handler_call_details.invocation_metadata)
        self._on_refusal(handler_call_details.method, request_id, refusal)
        return _denying(handler, refusal, request_id)

    def _refusal(self, key: str, metadata: Any) -> LoramuxError | None:
        given = [value for name, value in metadata or () if name == "authorization"]
        if not given:
            return self._unauthenticated(
                f"the {self._scope} port asks for a token: send the header 'authorization: Bearer <token>'",
                "TOKEN_MISSING",
            )
        scheme, _, token = given[0].partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or len(given) > 1:
            return self._unauthenticated("the authorization header must be 'Bearer <token>'", "TOKEN_INVALID")
        if _same(token, key):
            return None
        if self._other_key is not None and _same(token, self._other_key):
            return WrongScope(f"this token is not for the {self._scope} port", metadata={"scope": self._scope})
        return self._unauthenticated("the token is wrong", "TOKEN_INVALID")

    def _unauthenticated(self, message: str, reason: str) -> Unauthenticated:
        return Unauthenticated(message, reason=reason, metadata={"scope": self._scope})


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), key.encode())


def _denying(handler: Any, error: LoramuxError, request_id: str) -> Handler:
    """A handler of the same arity that aborts: grpc.aio drives a call by its handler's arity.

    It has no deserializer, so an unauthenticated caller's message is never parsed.
    """

    async def deny(_request: Any, context: Context) -> None:
        await abort(context, error, request_id)

    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(deny)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(deny)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(deny)
    return grpc.unary_unary_rpc_method_handler(deny)

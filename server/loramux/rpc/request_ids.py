"""The id of the request that an RPC answers, as its caller knows it: errors, answers and log lines carry it.

It is the message's `request_id`, else the call's `x-request-id` (which proxies set), else one made here.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from google.protobuf.descriptor import Descriptor

from loramux.rpc import wire

HEADER = "x-request-id"
MAX_CHARACTERS = 128  # as engine.settings has it for the field; of a longer one the beginning is shown

_current: ContextVar[str] = ContextVar("loramux_request_id", default="")


def begin(message: Any, metadata: Iterable[tuple[str, Any]] | None) -> str:
    """Find or make the id of this task's RPC, for `current` too. `message` may be of any type, or none at all."""
    given = getattr(getattr(message, "request", message), "request_id", "") or _header(metadata)
    request_id = given[:MAX_CHARACTERS] or new()
    _current.set(request_id)
    return request_id


def find(raw: bytes, message: Descriptor | None) -> str:
    """The id in a serialized `message` that is refused before it is parsed; "" if there is none."""
    if message is None:
        return ""
    most = 4 * MAX_CHARACTERS
    return wire.find_text(raw, message, "request_id", most_bytes=most) or wire.find_text(
        raw, message, "request", "request_id", most_bytes=most
    )


def current() -> str:
    """The id of this task's RPC; a new one outside of any."""
    return _current.get() or new()


def new() -> str:
    """An id that nobody else has."""
    return uuid.uuid4().hex


def _header(metadata: Iterable[tuple[str, Any]] | None) -> str:
    """A header that is too long is no id that its caller would find again."""
    found = [value for key, value in metadata or () if key == HEADER and isinstance(value, str)]
    return found[0] if found and len(found[0]) <= MAX_CHARACTERS else ""

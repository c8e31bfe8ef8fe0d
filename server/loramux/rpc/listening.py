"""Makes grpc.aio servers with our options and binds them to addresses. Knows nothing of what they serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from loramux.config import Settings
from loramux.errors import StartupError
from loramux.files import read_file
from loramux.rpc.auth import BearerAuth
from loramux.rpc.boundary import Boundary, OnError, OnRefusal, hard_cap
from loramux.rpc.wire import Bounds

_OTHER_STREAMS = 256  # of one connection: probes, watches, questions


def make_server(
    settings: Settings,
    *,
    scope: str,
    key: str | None,
    other_key: str | None,
    bounds: Bounds,
    on_error: OnError,
    on_refusal: OnRefusal,
) -> grpc.aio.Server:
    """A server that asks for `key` (if any), takes messages within `bounds` and answers every error from the status
    table."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", hard_cap(settings.max_message_bytes)),
        ("grpc.max_send_message_length", -1),
        # As many as could be queued and running, and then some: beyond, a connection's calls wait in its client.
        ("grpc.max_concurrent_streams", settings.max_queue + settings.max_batch_rows + _OTHER_STREAMS),
        ("grpc.so_reuseport", 0),  # else a second server takes the same port in silence and half of the calls
        ("grpc.keepalive_time_ms", 60_000),  # finds clients whose machine is gone
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients may ping every 10 s
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    interceptors = (
        BearerAuth(key, scope=scope, other_key=other_key, on_refusal=on_refusal),  # first: strangers cost nothing
        Boundary(settings.max_message_bytes, bounds, on_error, on_refusal),
    )
    return grpc.aio.server(interceptors=interceptors, options=options)


def bind(server: grpc.aio.Server, host: str, port: int, settings: Settings, *, flag: str) -> str:
    """Listen on host:port (0 takes a free one) or on unix:PATH. Returns the address. Raises StartupError."""
    unix = host.startswith("unix:")
    shown = f"[{host.strip('[]')}]" if ":" in host and not unix else host
    address = host if unix else f"{shown}:{port}"
    try:
        if settings.tls_cert is not None and settings.tls_key is not None:
            pair = (_read(settings.tls_key, "--tls-key"), _read(settings.tls_cert, "--tls-cert"))
            bound = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            bound = server.add_insecure_port(address)
    except RuntimeError:
        raise StartupError(
            f"{flag}: cannot listen on {address}: it is taken, not an address of this machine, or the "
            "certificate is unfit; choose another port, or 0 for a free one"
        ) from None
    return address if unix else f"{shown}:{bound}"


def _read(file: Path, flag: str) -> bytes:
    try:
        return read_file(file)
    except OSError as error:
        raise StartupError(f"{flag}: cannot read {file}: {error.strerror}") from None

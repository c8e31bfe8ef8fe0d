"""/metrics and the probes of health on a port of their own, from a thread of their own.

Nothing here runs on the server's event loop, so a scrape delays no token. Whoever connects is a stranger: connections,
bytes of a request and the time that anything may take are bounded, one more connection costs the one that was quiet
for longest, and pages are rendered one at a time. Knows nothing of what the metrics mean.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST

from loramux.errors import StartupError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
MAX_HEAD_BYTES = 8192  # request line and headers
IDLE_SECONDS = 30.0  # from the last answer, or from connecting, to the end of the next request
SEND_SECONDS = 10.0  # for an answer to be taken, and again for the connection to be closed after it
MIN_RENDER_SECONDS = 0.01  # from the beginning of one page to that of the next

_READ_BYTES = 4096
_REST_SECONDS = 0.5  # when no descriptor is left
_READY, _ALIVE = ("/healthz", "/health", "/readyz"), "/livez"
_END = b"\r\n\r\n"
_PLAIN = "text/plain; charset=utf-8"


class MetricsServer:
    """Binds when it is made (port 0 takes a free one), serves from `start` until `stop`.

    `render` gives the text exposition, on another thread; `serving` whether requests are welcome, and takes no time.
    Raises StartupError if it cannot listen.
    """

    def __init__(self, host: str, port: int, *, render: Callable[[], bytes], serving: Callable[[], bool]) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host.strip("[]"), port), family=family, backlog=MAX_CONNECTIONS)
            self._socket.setblocking(False)
        except OSError as error:
            raise StartupError(
                f"--metrics-port {port}: cannot listen on {host}: {error.strerror or error}; "
                "choose another port, or 0 to serve no metrics"
            ) from None
        self.port = int(self._socket.getsockname()[1])
        self._render = render
        self._serving = serving
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="metrics", daemon=True)
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event
        self._connections: dict[asyncio.Task[None], None] = {}  # the one that was quiet for longest comes first
        self._page: asyncio.Task[bytes] | None = None
        self._next_render = 0.0

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        """End the thread and give the port back."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
        self._socket.close()

    # Its own thread.

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._loop.add_reader(self._socket, self._accept)
        self._started.set()
        await self._stopping.wait()
        self._loop.remove_reader(self._socket)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:  # whoever it was has gone, or no descriptor is left
            if not isinstance(error, BlockingIOError | ConnectionError):
                log.warning("the metrics port cannot take a connection: %s", error)
                self._loop.remove_reader(self._socket)
                self._loop.call_later(_REST_SECONDS, self._loop.add_reader, self._socket, self._accept)
            return
        connection.setblocking(False)
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            self._connections.pop(oldest)
            oldest.cancel()
        task = asyncio.create_task(self._attend(connection))
        self._connections[task] = None
        task.add_done_callback(partial(self._close, connection))

    def _close(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._connections.pop(task, None)
        connection.close()

    async def _attend(self, connection: socket.socket) -> None:
        task, unread = asyncio.current_task(), bytearray()
        assert task is not None
        try:
            while await self._exchange(connection, unread):
                self._connections[task] = self._connections.pop(task)  # to the end
            await self._linger(connection)
        except (OSError, TimeoutError):
            pass  # it went away, or was too slow
        except Exception:
            log.exception("answering a scrape failed")

    async def _exchange(self, connection: socket.socket, unread: bytearray) -> bool:
        """Answer one request; whether another may follow on this connection."""
        async with asyncio.timeout(IDLE_SECONDS):
            head = await self._head(connection, unread)
        if head is None:
            return False  # closed
        if len(head) > MAX_HEAD_BYTES:
            asked, answer = _BAD, _refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            asked = _parse(head) or _BAD
            answer = await self._answer(asked)
        async with asyncio.timeout(SEND_SECONDS):
            await self._loop.sock_sendall(connection, answer.to_bytes(body=asked.method != "HEAD", keep=asked.keep))
        return asked.keep

    async def _head(self, connection: socket.socket, unread: bytearray) -> bytes | None:
        """The next request up to its empty line, or more than MAX_HEAD_BYTES of one; None at the end."""
        while True:
            end = unread.find(_END)
            length = end + len(_END) if end >= 0 else len(unread)
            if end >= 0 or length > MAX_HEAD_BYTES:
                head = bytes(unread[:length])
                del unread[:length]
                return head
            part = await self._loop.sock_recv(connection, _READ_BYTES)
            if not part:
                return None
            unread += part

    async def _linger(self, connection: socket.socket) -> None:
        """Let the other side read the last answer: closing with bytes unread would take it back."""
        connection.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(SEND_SECONDS):
            while await self._loop.sock_recv(connection, _READ_BYTES):
                pass

    async def _answer(self, asked: _Request) -> _Answer:
        if asked is _BAD:
            return _refused(HTTPStatus.BAD_REQUEST)
        if asked.method not in ("GET", "HEAD"):
            return _refused(HTTPStatus.METHOD_NOT_ALLOWED)
        if asked.path == "/metrics":
            return _Answer(HTTPStatus.OK, await self._rendered(), CONTENT_TYPE_LATEST)
        if asked.path == _ALIVE or (asked.path in _READY and self._serving()):
            return _Answer(HTTPStatus.OK, b"ok\n")
        if asked.path in _READY:
            return _Answer(HTTPStatus.SERVICE_UNAVAILABLE, b"not serving\n")
        return _Answer(HTTPStatus.NOT_FOUND, f"there are /metrics, {', '.join(_READY)} and {_ALIVE}\n".encode())

    async def _rendered(self) -> bytes:
        """The page. Who asks while it is being rendered gets that one: scrapes cost no more for being many."""
        if self._page is None or self._page.done():
            self._page = asyncio.create_task(self._render_in_turn())
        return await asyncio.shield(self._page)

    async def _render_in_turn(self) -> bytes:
        await asyncio.sleep(self._next_render - time.monotonic())
        self._next_render = time.monotonic() + MIN_RENDER_SECONDS
        return await asyncio.to_thread(self._render)


@dataclass(frozen=True, slots=True)
class _Request:
    """What is of use of a request; `keep`: the connection may stay."""

    method: str
    path: str
    keep: bool


_BAD = _Request("", "", keep=False)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    body: bytes
    content_type: str = _PLAIN

    def to_bytes(self, *, body: bool, keep: bool) -> bytes:
        lines = [
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            *([] if keep else ["Connection: close"]),
            *(["Allow: GET, HEAD"] if self.status is HTTPStatus.METHOD_NOT_ALLOWED else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + (self.body if body else b"")


def _refused(status: HTTPStatus) -> _Answer:
    return _Answer(status, f"{status.phrase.lower()}\n".encode())


def _parse(head: bytes) -> _Request | None:
    """None if it is not HTTP/1. A body is never read: the connection ends after the answer to a request with one."""
    request_line, *lines = head.decode("latin-1").split("\r\n")
    method, _, rest = request_line.partition(" ")
    target, _, version = rest.partition(" ")
    if not (method.isalpha() and target and version in ("HTTP/1.0", "HTTP/1.1")):
        return None
    pairs = (line.lower().partition(":") for line in lines)
    headers = {name.strip(): value.strip() for name, _, value in pairs}
    has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    keep = version == "HTTP/1.1" and headers.get("connection") != "close" and not has_body
    return _Request(method, target.partition("?")[0], keep and method in ("GET", "HEAD"))

"""/metrics and /healthz on a port of their own, from threads of their own.

Nothing here runs on the event loop, so a scrape delays no token. Knows nothing of what the metrics mean.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from loramux.errors import StartupError

log = logging.getLogger(__name__)


class MetricsServer:
    """Binds when it is made (port 0 takes a free one), serves from `start` until `stop`.

    `render` gives the text exposition, `serving` whether requests are welcome; both are called on threads of this
    server. Raises StartupError if it cannot listen.
    """

    def __init__(self, host: str, port: int, *, render: Callable[[], bytes], serving: Callable[[], bool]) -> None:
        try:
            self._server = _Server((host, port), render, serving)
        except OSError as error:
            raise StartupError(
                f"--metrics-port {port}: cannot listen on {host}: {error.strerror or error}; "
                "choose another port, or 0 to serve no metrics"
            ) from None
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End the listening thread and give the port back."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # idle keep-alive connections must not hold up the end

    def __init__(self, address: tuple[str, int], render: Callable[[], bytes], serving: Callable[[], bool]) -> None:
        self.render = render
        self.serving = serving
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that went away is no news; anything else is a defect."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            log.exception("answering a scrape failed")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # scrapers keep their connection
    timeout = 30.0  # seconds without a request, after which a connection is closed
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(HTTPStatus.OK, self.server.render(), CONTENT_TYPE_LATEST)
        elif path != "/healthz":
            self._answer(HTTPStatus.NOT_FOUND, b"there are /metrics and /healthz\n")
        elif self.server.serving():
            self._answer(HTTPStatus.OK, b"ok\n")
        else:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"not serving\n")

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line each."""

"""The metrics port among strangers: whatever they send or keep open, a scrape is answered and nothing piles up."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from loramux.http import metrics_server
from loramux.http.metrics_server import MAX_CONNECTIONS, MAX_HEAD_BYTES, MetricsServer

from tests.patience import PATIENCE

PAGE = b"loramux_up 1\n"


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    made = MetricsServer("127.0.0.1", 0, render=lambda: PAGE, serving=lambda: True)
    made.start()
    yield made
    made.stop()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)


def scrape(server: MetricsServer, method: str = "GET", path: str = "/metrics") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def exchange(server: MetricsServer, raw: bytes) -> bytes:
    """All that comes back before the connection ends."""
    with connect(server) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_a_scrape_is_answered_beside_many_idle_connections(server: MetricsServer) -> None:
    """Each had a thread of its own, for as long as its owner liked."""
    threads = threading.active_count()
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(server)) for _ in range(MAX_CONNECTIONS + 136)]
        for i, connection in enumerate(idle):
            with suppress(OSError):  # it may have lost its place already
                connection.sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (i % 3))  # and no more
        for _ in range(5):
            assert scrape(server) == (200, PAGE)
        assert len(server._connections) <= MAX_CONNECTIONS
        assert threading.active_count() <= threads + 8  # those that render, however many ask
        with suppress(ConnectionError):
            assert idle[0].recv(1) == b"", "the oldest made room"
    assert scrape(server) == (200, PAGE)


def test_a_connection_that_is_used_is_not_the_one_that_goes(server: MetricsServer) -> None:
    scraper = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    with ExitStack() as stack:
        for _ in range(4):
            scraper.request("GET", "/metrics")
            kept = scraper.sock
            assert scraper.getresponse().read() == PAGE
            for _ in range(MAX_CONNECTIONS // 2):
                stack.enter_context(connect(server))
            assert scrape(server) == (200, PAGE)
            assert scraper.sock is kept
    scraper.close()


def test_a_request_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, server: MetricsServer) -> None:
    monkeypatch.setattr(metrics_server, "IDLE_SECONDS", 0.05)
    for sent in (b"", b"G", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"):
        with connect(server) as connection, suppress(ConnectionError):
            connection.sendall(sent)
            assert connection.recv(1) == b""


def test_a_reader_that_takes_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "SEND_SECONDS", 0.05)
    made = MetricsServer("127.0.0.1", 0, render=lambda: b"x" * (64 << 20), serving=lambda: True)
    made.start()
    with connect(made) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert connection.recv(1)
        ends = time.monotonic() + PATIENCE
        while made._connections and time.monotonic() < ends:
            time.sleep(0.001)
        assert not made._connections
    made.stop()


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n", 431),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics HTTP/2\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),  # TLS, as it were
        (b"GET /..%2f..%2fetc/passwd HTTP/1.0\r\n\r\n", 404),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nContent-Length: 30\r\n\r\nGET /livez HTTP/1.1\r\n\r\n", 200),
    ],
)
def test_whatever_comes_gets_one_answer(server: MetricsServer, raw: bytes, status: int) -> None:
    answer = exchange(server, raw)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.count(b"HTTP/1.1 ") == 1, "a body was taken for a request"
    assert b"\r\nConnection: close\r\n" in answer
    assert scrape(server) == (200, PAGE)


def test_requests_in_a_row_and_head(server: MetricsServer) -> None:
    one = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    assert exchange(server, one * 3).count(b"HTTP/1.1 200 OK") == 3
    assert scrape(server, "HEAD") == (200, b"")
    head = exchange(server, b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert f"Content-Length: {len(PAGE)}".encode() in head
    assert PAGE not in head


def test_pages_are_rendered_one_at_a_time() -> None:
    """Every scrape asks the server's event loop for figures."""
    at_once, most, lock = 0, 0, threading.Lock()
    going_on = threading.Event()

    def render() -> bytes:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        going_on.wait(PATIENCE)
        with lock:
            at_once -= 1
        return PAGE

    made = MetricsServer("127.0.0.1", 0, render=render, serving=lambda: True)
    made.start()
    answers: list[tuple[int, bytes]] = []
    scrapers = [threading.Thread(target=lambda: answers.append(scrape(made))) for _ in range(10)]
    for scraper in scrapers:
        scraper.start()
    assert scrape(made, path="/livez") == (200, b"ok\n"), "probes do not wait for pages"
    going_on.set()
    for scraper in scrapers:
        scraper.join(PATIENCE)
    assert answers == [(200, PAGE)] * 10
    assert most == 1
    made.stop()


def test_a_defect_in_a_page_ends_one_answer_only(caplog: pytest.LogCaptureFixture) -> None:
    pages: Iterator[bytes | Exception] = iter([KeyError("x"), PAGE])

    def render() -> bytes:
        page = next(pages)
        if isinstance(page, Exception):
            raise page
        return page

    made = MetricsServer("127.0.0.1", 0, render=render, serving=lambda: True)
    made.start()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        scrape(made)
    assert "answering a scrape failed" in caplog.text
    assert scrape(made) == (200, PAGE)
    made.stop()


def test_open_connections_do_not_hold_up_the_end(server: MetricsServer) -> None:
    with connect(server) as idle, connect(server) as half:
        half.sendall(b"GET /metrics HTTP/1.1\r\n")
        server.stop()
        with suppress(ConnectionError):
            assert idle.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            connect(server)

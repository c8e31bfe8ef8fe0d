"""From the start of `loramux serve` to its end, without a model: what is told, and what a signal does when."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loramux import serve
from loramux.rpc.server import Addresses

pytest.importorskip("torch", reason="the command asks for all that the server needs")

# Runs `loramux serve` with a stand-in for what loads models, which does what SCRIPT says; BEFORE is run first.
PROGRAM = """
import sys, time, types
fake = types.ModuleType("loramux.assembly")
def prepare_model(settings, phases):
    phases.begin("Loading a stand-in")
    print("loading", file=sys.stderr, flush=True)
    {script}
fake.prepare_model = prepare_model
sys.modules["loramux.assembly"] = fake
{before}
from loramux.cli import main
main()
"""


def start(script: str, *flags: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
    ports = () if "--port" in flags else ("--port", "0", "--admin-port", "0", "--metrics-port", "0")
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(script=script, before=before), "serve", *ports, *flags],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("LORAMUX_")} | environment,
    )


def read_until(child: subprocess.Popen[str], word: str) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        if word in line:
            return
    raise AssertionError(f"ended before {word}")


def ended(child: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = child.communicate(timeout=120)
    assert "Traceback" not in said
    return child.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", ["time.sleep(600)", "while True: pass"])
def test_a_signal_while_loading_ends_it_at_once(number: signal.Signals, script: str) -> None:
    """It was loaded to the end, a minute later, and served for a moment."""
    child = start(script)
    read_until(child, "loading")
    child.send_signal(number)
    status, said = ended(child)
    assert status == 0
    assert "Stopped while loading." in said


def test_a_module_that_makes_something_else_of_the_signal_is_no_error() -> None:
    """numpy, interrupted while torch imports it, raises ImportError."""
    child = start(
        "try:\n        print('importing', file=sys.stderr, flush=True)\n        time.sleep(600)\n"
        "    except BaseException:\n        raise ImportError('not initialized') from None"
    )
    read_until(child, "importing")
    child.send_signal(signal.SIGINT)
    status, said = ended(child)
    assert status == 0
    assert "Stopped while loading." in said


def test_an_import_that_swallows_the_signal_is_not_waited_for() -> None:
    """torch does without numpy if the import of that fails."""
    before = """
def importing(name):
    try:
        print("importing", file=sys.stderr, flush=True)
        time.sleep(600)
    except BaseException:
        time.sleep(600)
del fake.prepare_model
fake.__getattr__ = importing
"""
    child = start("pass", before=before)
    read_until(child, "importing")
    child.send_signal(signal.SIGINT)
    status, said = ended(child)
    assert status == 0
    assert "Stopped while loading." in said


def test_a_second_signal_ends_what_the_first_did_not() -> None:
    child = start(
        "try:\n        print('trying', file=sys.stderr, flush=True)\n        time.sleep(600)\n"
        "    finally:\n        print('undoing', file=sys.stderr, flush=True)\n        time.sleep(600)"
    )
    for word in ("trying", "undoing"):
        read_until(child, word)
        child.send_signal(signal.SIGTERM)
    assert ended(child)[0] == 1


def test_what_waits_for_its_own_threads_is_not_waited_for() -> None:
    """A download from a hub runs in such threads, for as long as it takes."""
    child = start(
        "import concurrent.futures\n"
        "    with concurrent.futures.ThreadPoolExecutor() as pool:\n"
        "        pool.submit(time.sleep, 600)\n"
        "        print('downloading', file=sys.stderr, flush=True)\n"
        "        time.sleep(600)",
        before="import loramux.serve; loramux.serve._GRACE_SECONDS = 0.2",
    )
    read_until(child, "downloading")
    child.send_signal(signal.SIGTERM)
    status, said = ended(child)
    assert status == 0
    assert "Stopped while loading." in said


def test_phases_are_bars_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PROGRAM.format(script="time.sleep(1); sys.exit(3)", before=""), "serve"]
    command += ["--port", "0", "--admin-port", "0", "--metrics-port", "0"]
    child = subprocess.Popen(command, stderr=theirs, stdin=subprocess.DEVNULL)
    os.close(theirs)
    said = b""
    with suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    assert child.wait(60) == 3
    assert b"Loading a stand-in" in said
    assert b"loramux.progress" not in said


def test_phases_are_log_lines_without_a_terminal() -> None:
    status, said = ended(start("from loramux.errors import StartupError; raise StartupError('x [/bold]\\x1b')"))
    assert status == 1
    assert "\x1b" not in said
    lines = said.splitlines()
    assert [line for line in lines if "Checking the settings: done in" in line]
    assert [line for line in lines if "Loading a stand-in …" in line]
    assert lines[-1] == "error: x [/bold]\\x1b"


def test_with_json_logs_every_line_is_json() -> None:
    """The error at the end was not."""
    for script in (
        "raise ZeroDivisionError('a\\nb')",
        "from loramux.errors import StartupError; raise StartupError('x')",
    ):
        status, said = ended(start(script, "--log-format", "json"))
        assert status == 1
        lines = [json.loads(line) for line in said.splitlines() if line != "loading"]
        assert lines[-1]["level"] == "error"
    child = start("time.sleep(600)", "--log-format", "json")
    read_until(child, "loading")
    child.send_signal(signal.SIGTERM)
    assert json.loads(ended(child)[1].splitlines()[-1])["message"] == "Stopped while loading."


def test_what_nobody_foresaw_is_one_sentence_too() -> None:
    status, said = ended(start("raise ZeroDivisionError('surprise')"))
    assert status == 1
    assert said.splitlines()[-1] == "error: unexpected ZeroDivisionError: surprise; LORAMUX_LOG_LEVEL=debug shows where"
    child = start("raise ZeroDivisionError('surprise')", LORAMUX_LOG_LEVEL="debug")
    _, said = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "Traceback" in said
    assert "shows where" not in said


def test_a_device_that_fails_at_start_has_its_own_status() -> None:
    child = start("from loramux.errors import DeviceLost; raise DeviceLost('seeded')")
    _, said = child.communicate(timeout=120)
    assert child.returncode == serve.DEVICE_LOST_STATUS == 70
    assert "the device has failed while the model was prepared" in said
    assert "seeded" in said


def test_libraries_show_no_bars_of_their_own() -> None:
    status, said = ended(start("import tqdm.auto; list(tqdm.auto.tqdm(range(3), desc='theirs')); sys.exit(3)"))
    assert status == 3
    assert "theirs" not in said
    assert "\r" not in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--adapter-dir", "/nowhere"), "--adapter-dir"),
        (("--adapter", "sql"), "--adapter sql"),
        (("--model", "/nowhere"), "/nowhere"),
        (("--ports-file", "/nowhere/ports"), "--ports-file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(flags: tuple[str, ...], sentence: str) -> None:
    status, said = ended(start("pass", *flags))
    assert status == 1
    assert "loading" not in said.splitlines()
    assert said.splitlines()[-1].startswith(f"error: {sentence}")


def test_a_taken_port_is_said_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        status, said = ended(start("pass", "--port", port, "--admin-port", "0", "--metrics-port", "0"))
    assert status == 1
    assert "loading" not in said.splitlines()
    assert f"error: --port: cannot listen on 127.0.0.1:{port}: it is taken" in said


async def test_a_signal_while_adapters_load_ends_it() -> None:
    closed = asyncio.Event()
    begun = asyncio.Event()

    async def start_for_ever() -> Addresses:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            closed.set()
        raise AssertionError

    application: Any = SimpleNamespace(server=SimpleNamespace(start=start_for_ever))
    stop = asyncio.Event()
    starting = asyncio.create_task(serve._start(application, stop, None))
    await begun.wait()
    stop.set()
    with pytest.raises(serve._Stopped):
        await starting
    assert closed.is_set()


async def test_a_server_that_starts_gives_its_addresses() -> None:
    addresses = Addresses("a", "b")

    async def start_at_once() -> Addresses:
        return addresses

    application: Any = SimpleNamespace(server=SimpleNamespace(start=start_at_once))
    assert await serve._start(application, asyncio.Event(), None) is addresses


def test_the_ports_file_appears_complete(tmp_path: Path) -> None:
    serve._write(tmp_path / "ports.json", Addresses("127.0.0.1:1", "127.0.0.1:2"))
    assert json.loads((tmp_path / "ports.json").read_text())["public"] == "127.0.0.1:1"
    assert [path.name for path in tmp_path.iterdir()] == ["ports.json"]

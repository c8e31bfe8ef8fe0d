"""The server that `loramux demo` starts, without a model."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest
from loramux.demo import serving

from tests.patience import PATIENCE
from tests.test_serve import PROGRAM

# Stands in for Python: writes what it was given as its ports, and ends on SIGTERM as a server does.
SERVER = """#!/bin/sh
trap 'exit 0' TERM
while [ "$1" != --ports-file ]; do shift; done
printf '{"isa": "%s", "threads": "%s", "port": "%s"}' "$LORAMUX_ISA" "$LORAMUX_THREADS" "$LORAMUX_PORT" >"$2.new"
mv "$2.new" "$2"
while :; do sleep 0.1; done
"""


def test_it_gets_what_is_set_for_the_machine_and_none_of_a_servers_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """LORAMUX_ISA and LORAMUX_THREADS were taken away with the settings."""
    stand_in = tmp_path / "python"
    stand_in.write_text(SERVER)
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    for name, value in (("ISA", "none"), ("THREADS", "3"), ("PORT", "99")):
        monkeypatch.setenv(f"LORAMUX_{name}", value)
    with serving("smollm2", tmp_path, []) as given:
        assert given == {"isa": "none", "threads": "3", "port": ""}


# Runs `loramux demo` with what stands in for Python.
DEMO = "import sys; sys.executable = {python!r}; from loramux.__main__ import main; main()"
ADAPTERS = Path(__file__).parent.parent / "adapters"
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


class Screen:
    """`loramux demo` on a terminal of its own, with a server that does what `script` says instead of loading."""

    def __init__(self, script: str, folder: Path) -> None:
        python = folder / "python"
        server = PROGRAM.format(script=script, before="del sys.argv[1:3]  # -m loramux")
        python.write_text(f"#!{sys.executable}\n{server}")
        python.chmod(0o755)
        self._ours, theirs = pty.openpty()
        self.shown = b""
        self.demo = subprocess.Popen(
            [sys.executable, "-c", DEMO.format(python=str(python)), "demo", "--adapter-dir", str(ADAPTERS)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.demo.kill()  # its server ends with it
        self.demo.wait()
        os.close(self._ours)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def read_until(self, text: bytes) -> None:
        while text not in self.shown:
            self.shown += os.read(self._ours, 65536)

    def read_all(self) -> int:
        """Until nobody has the terminal any more, neither the demo nor its server; the demo's status."""
        with suppress(OSError):  # the end of a terminal
            while part := os.read(self._ours, 65536):
                self.shown += part
        return self.demo.wait(PATIENCE)


def cursor_is_shown(shown: bytes) -> bool:
    return HIDE in shown and shown.rindex(SHOW) > shown.rindex(HIDE)


def test_ctrl_c_while_the_server_loads(tmp_path: Path) -> None:
    """The server got the terminal's signal and the demo's, ended at the second, and left the cursor hidden."""
    with Screen("time.sleep(600)", tmp_path) as screen:
        screen.read_until(b"Loading a stand-in")
        screen.type(b"\x03")
        assert screen.read_all() == 130
    assert cursor_is_shown(screen.shown)
    assert screen.shown.endswith(b"Stopped.\r\n" + SHOW), screen.shown
    assert b"Traceback" not in screen.shown


def test_a_server_that_is_killed_leaves_the_cursor_shown(tmp_path: Path) -> None:
    with Screen("import os; os.kill(os.getpid(), 9)", tmp_path) as screen:
        assert screen.read_all() == 1
    assert cursor_is_shown(screen.shown)
    assert b"the server ended with exit status -9; see above" in screen.shown

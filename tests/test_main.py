"""What a signal does to a command from its first moment to its last: it ends with its status, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE

HERE = "print('here', file=sys.stderr, flush=True); time.sleep(600)"
# Stands in for a library: says that it is imported, and goes on with that for ever.
SLOW = f"import sys, time\n{HERE}\n"
# Runs a command whose way out never ends.
LATE = f"""
import atexit, sys, time
from loramux.__main__ import main
def late():
    {HERE}
atexit.register(late)
main()
"""


def interrupted(command: list[str], number: signal.Signals, **environment: str) -> tuple[int, str]:
    """Its status and what it said, after a signal once it has said `here`."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "here\n"
        child.send_signal(number)
        _, said = child.communicate(timeout=PATIENCE)
    return child.returncode, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("typer", ["serve"]),
        ("pydantic", ["serve"]),
        ("typer", ["generate", "x"]),
        ("grpc", ["generate", "x"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_signal_while_it_imports(library: str, words: list[str], number: signal.Signals, tmp_path: Path) -> None:
    """Before the handlers of `serve` were there, it was a traceback and death by the signal."""
    (tmp_path / f"{library}.py").write_text(SLOW)
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    status = 0 if words == ["serve"] else 128 + number
    assert interrupted(["-m", "loramux", *words], number, PYTHONPATH=path) == (status, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_on_the_way_out(number: signal.Signals) -> None:
    assert interrupted(["-c", LATE, "generate", "--help"], number) == (128 + number, "")

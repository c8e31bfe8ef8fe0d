"""Runs the cases: each folder against a server of its own, each case in a process of its own. `make cases` runs all.

Knows nothing of what a case tries; see README.md beside this file for what each exit code says.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.server_process import serve

HERE = Path(__file__).parent
SHARED = ("case.py", "own_server.py")
PATIENCE = 600.0  # seconds that one case may take, on a slow machine with other work
VERDICTS = {0: "right", 1: "FAULT", 2: "cannot be tried"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case ended. `said` is all that it printed."""

    code: int
    seconds: float
    said: str


def folders() -> list[Path]:
    """Where the cases are."""
    return sorted(path for path in HERE.iterdir() if (path / "case.py").exists() or path.name == "serving")


def cases(folder: Path) -> list[Path]:
    """The cases of one folder."""
    return sorted(path for path in folder.glob("*.py") if path.name not in SHARED)


@contextmanager
def environment(folder: Path) -> Iterator[dict[str, str]]:
    """What the cases read, of a server on the embedded model that runs meanwhile with `folder`/[/x] as its root."""
    root = folder / "[" / "x]"  # hostile/markup_in_folder_name
    root.mkdir(parents=True)
    with serve(["--adapter-dir", str(root), "--kv-memory", "256MiB"], folder) as server:
        yield {
            "ROOT": str(root),
            "LOG": str(folder / "server.log"),
            "TARGET": server.target,
            "ADMIN": server.admin,
            "METRICS": server.metrics.removeprefix("http://").removesuffix("/metrics"),
        }


def run(case: Path, variables: dict[str, str]) -> Outcome:
    """Run one case to its end."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, case.name],
        cwd=case.parent,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )
    return Outcome(done.returncode, time.monotonic() - started, done.stdout)


def main() -> int:
    """Run those whose path holds one of the given words, all without any; 0 if each of them is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="run only cases whose path holds one of these words")
    words = parser.parse_args().words
    wrong = 0
    for folder in folders():
        chosen = [case for case in cases(folder) if not words or any(w in f"{folder.name}/{case.name}" for w in words)]
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as scratch, environment(Path(scratch)) as variables:
            for case in chosen:
                outcome = run(case, variables)
                wrong += outcome.code != 0
                verdict = VERDICTS.get(outcome.code, f"exit code {outcome.code}")
                print(f"{verdict:<16}{outcome.seconds:7.1f} s  {folder.name}/{case.stem}", flush=True)
                print("".join(f"    {line}\n" for line in outcome.said.splitlines()), end="", flush=True)
    print("all cases are right" if not wrong else f"{wrong} cases are not right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

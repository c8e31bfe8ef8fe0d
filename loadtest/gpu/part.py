"""The parts of the GPU check, and how one is run: in a process group of its own, for its share of the time.

A kernel that reads outside its memory breaks its process's CUDA context for good, and one that never ends can only be
killed: what is measured after it is measured elsewhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadtest.gpu.report import Findings
from loadtest.server_process import tail

GRACE_SHARE, GRACE_MOST = 0.1, 8.0


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to check, with its share of the time. Parts of one block become one table of docs/gpu.md."""

    name: str
    block: str
    share: float


# In the order in which they run; what a part leaves of its time falls to those after it.
PARTS = (
    Part("machine", "machine", 4),  # the first import of torch on a cold machine; the rest is handed on
    Part("tests", "tests", 7),
    Part("steps", "steps", 10),
    Part("gemm", "gemm", 3),
    Part("peers", "steps", 5),
    Part("invariant", "steps", 3),
    Part("served", "served", 5),
    Part("smollm2", "served", 3),
)
BLOCKS = tuple(dict.fromkeys(part.block for part in PARTS))


def limit(part: Part, rest: Sequence[Part], left: float) -> float:
    """Seconds for `part`, when `rest` come after it and `left` seconds are left for all."""
    return left * part.share / (part.share + sum(other.share for other in rest))


def soft_limit(seconds: float) -> float:
    """When a part should begin nothing more, to end before it is killed."""
    return seconds - min(GRACE_SHARE * seconds, GRACE_MOST)


def run_part(command: Sequence[str], rows: Path, log: Path, seconds: float) -> Findings:
    """Run `command`, which appends its findings to `rows`; kill it and all it started after `seconds`.

    A process that was killed, or ends with another status than 0, is one more problem; what it found stands.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # Its servers too, whichever way it ended.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = Findings.read(rows)
    where = f", at {found.at}" if found.at else ""
    if status is None:
        found.problems.append(f"not done after {time.monotonic() - begin:.0f} s and killed{where}")
    elif status != 0:
        last = tail(log, 1).strip()
        found.problems.append(f"ended with status {status}{where}: {last}" if last else f"ended with {status}{where}")
    return found

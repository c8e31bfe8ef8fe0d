"""The parts of the GPU check, and how one is run: in a process group of its own, which is killed at its limit.

A kernel that reads outside its memory breaks its process's CUDA context for good, and one that never ends can only be
killed: what is measured after it is measured elsewhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.gpu.report import Job, Report, parse

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "gpu-check"
# Of compiled kernels. Triton's cache holds absolute paths: one that is carried elsewhere has to lie at the same place.
KERNELS = Path(tempfile.gettempdir()) / "loramux-gpu-check"
ARCHIVE, MOST_ARCHIVE = "triton-cache.tar.gz", 16 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A function of this package (module:function) for a table of the document, and the most seconds it may take.

    With `files`, patterns of tests: the function is called for each file, in a process of its own.
    """

    table: str
    function: str
    seconds: float
    files: tuple[str, ...] = ()


PARTS = {
    "machine": Part("machine", "machine:machine", 40),
    "compile": Part("compile", "machine:compile_kernels", 60),
    "smoke": Part("smoke", "pytests:run_file", 40, ("tests/gpu/test_smoke_*.py",)),
    "steps": Part("steps", "steps:steps", 70),
    "profile": Part("profile", "steps:profile", 45),
    "gemm": Part("gemm", "gemm:gemm", 30),
    "pack": Part("pack", "parts:pack", 10),
    "tests": Part("tests", "pytests:run_file", 60, ("tests/gpu/test_[!s]*.py", "tests/ops/test_triton_*.py")),
    "all-steps": Part("steps", "steps:all_steps", 90),
    "peers": Part("steps", "peers:peers", 60),
    "served": Part("served", "served:served", 100),
    "sanitizer": Part("sanitizer", "pytests:sanitize", 100),
}
FIRST = ("machine", "compile", "smoke", "steps", "profile", "gemm", "pack", "tests")
SECOND = ("machine", "smoke", "all-steps", "peers", "served", "sanitizer")


def commands(name: str) -> Iterator[tuple[str, list[str]]]:
    """What a part runs: a title, and its arguments for `loadtest gpu-part`."""
    part = PARTS[name]
    if not part.files:
        yield name, [name]
    for pattern in part.files:
        for path in sorted(ROOT.glob(pattern)):
            file = str(path.relative_to(ROOT))
            yield f"{name} {file}", [name, file]


def soft_limit(seconds: float) -> float:
    """When a part should begin nothing more, to end before it is killed."""
    return seconds - min(0.1 * seconds, 5.0)


def run_part(
    command: Sequence[str], report: Report, log: Path, seconds: float, show: Callable[[dict[str, Any]], None]
) -> bool:
    """Run `command`, which appends to the report's file; kill it and all it started after `seconds`.

    Each line that it has written is given to `show`. A process that was killed, or ends with another status than 0, is
    one more problem. Returns whether there was none.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    seen = report.file.stat().st_size if report.file.exists() else 0
    logged = log.stat().st_size if log.exists() else 0
    begin, at, passed = time.monotonic(), "", True

    def follow() -> None:
        nonlocal seen, at, passed
        with report.file.open("rb") as lines:
            lines.seek(seen)
            whole, newline, _ = lines.read().rpartition(b"\n")
        seen += len(whole + newline)
        for line in parse(whole.decode(errors="replace").splitlines()):
            at = line.get("at", at)
            passed = passed and "problem" not in line
            show(line)

    report.file.touch()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() < begin + seconds:
                follow()
                time.sleep(0.05)
            status = process.poll()
        finally:
            # Its servers too, whichever way it ended.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    follow()
    if report.file.stat().st_size > seen:  # killed within a line: the next one is a line of its own
        with report.file.open("a") as rows:
            rows.write("\n")
    where = f", at {at}" if at else ""
    if status is None:
        report.problem(f"not done after {time.monotonic() - begin:.0f} s and killed{where}")
    elif status != 0:
        lines = log.read_bytes()[logged:].decode(errors="replace").strip().splitlines()
        report.problem(f"ended with status {status}{where}: {lines[-1] if lines else 'nothing in the log'}")
    follow()
    return passed


def pack(job: Job) -> None:
    """The compiled kernels as an archive beside the rows, for a later run on a machine of the same kind."""
    cache, archive = Path(os.environ["TRITON_CACHE_DIR"]), job.report.file.parent / ARCHIVE
    with tarfile.open(archive, "w:gz") as out:
        for file in cache.glob("*/*"):
            # What a start needs; the rest are the compiler's stages in between.
            if file.suffix in (".cubin", ".json", ".ptx", ".so"):
                out.add(file, file.relative_to(cache))
    size = archive.stat().st_size
    job.report.row({"archive": ARCHIVE, "bytes": size})
    if size > MOST_ARCHIVE:
        archive.unlink()
        job.report.problem(f"the cache's archive has {size:,} bytes, more than {MOST_ARCHIVE:,}: not kept")

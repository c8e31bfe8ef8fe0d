"""`python -m loadtest gpu-check`, and `gpu-part`, which it runs for each part."""

from __future__ import annotations

import datetime
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.console import emit, err
from loadtest.gpu.parts import FIRST, PARTS, ROOT, SECOND, processes
from loadtest.gpu.report import Job, cell, read, render, update
from loadtest.gpu.scale import DRY, FULL

DOCUMENT = ROOT / "docs" / "gpu.md"
LEAST = 2.0  # seconds in which a part can do anything


def gpu_check(
    parts: Annotated[str, typer.Option(help=f"Parts, in this order: {', '.join(PARTS)}; or none. [default: all]")] = "",
    first: Annotated[bool, typer.Option("--first", help=f"The first run: {', '.join(FIRST)}.")] = False,
    second: Annotated[bool, typer.Option("--second", help=f"The second run: {', '.join(SECOND)}.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="Most seconds that all may take together.")] = 300,
    out: Annotated[
        Path, typer.Option(envvar="GPU_CHECK_OUT", help="The output folder; lines are added to those that it has.")
    ] = ROOT / ".cache" / "gpu-check",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The same code with tiny shapes on the CPU; its figures mean nothing.")
    ] = False,
    commit: Annotated[str, typer.Option(help="What is checked. [default: what git says]")] = "",
    document: Annotated[
        bool, typer.Option("--document", help="Write all runs of the folder into docs/gpu.md.")
    ] = False,
) -> None:
    """Check and measure the GPU path on this machine, without a network.

    Each part is a process of its own. What it finds is added at once to rows.jsonl in the output folder, and gpu.md is
    written again after each part. A failure is a row that says so, and the status is then 1; 2 without a GPU.

    Example:

    `python -m loadtest gpu-check --first --seconds 200 --out results`
    """
    end = time.monotonic() + seconds
    names = FIRST if first else SECOND if second else tuple(PARTS) if not parts else tuple(parts.split(","))
    names = tuple(name for name in names if name != "none")
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"--parts takes {', '.join(PARTS)}, not {', '.join(unknown)}")
    if names and not dry_run:
        require_device()
    out = out.resolve()  # parts run in the checkout
    out.mkdir(parents=True, exist_ok=True)
    rows, failed = out / "rows.jsonl", False
    run = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}, loramux {commit or checked_out()}"
    for name, *file in (arguments for part in names for arguments in processes(part)):
        part = PARTS[name]
        limit = min(part.seconds * (3 if dry_run else 1), end - time.monotonic())
        job = Job(DRY if dry_run else FULL, rows, run, part.table, limit)
        title = " ".join([name, *file])
        err.print(f"{title}: at most {limit:.0f} s …")
        options = ["--rows", str(rows), "--run", run, "--seconds", f"{0.9 * limit:.1f}"]
        command = [sys.executable, "-m", "loadtest", "gpu-part", name, *file, *options, *["--dry-run"] * dry_run]
        late = limit < LEAST
        for line in [job.tell(problem=f"{title}: no time was left")] if late else run_part(command, job, out / "log"):
            failed |= "problem" in line
            row = ", ".join(f"{column}: {cell(value)}" for column, value in line.get("row", {}).items())
            text = line.get("problem") or line.get("note") or row
            err.print(f"  {text}", style="red" if "problem" in line else "", soft_wrap=True, markup=False)
        (out / "gpu.md").write_text(render(read(rows)))
    if document:
        update(DOCUMENT, render(read(rows)))
    emit({"verdict": "fail" if failed else "pass", "run": run, "out": str(out)})
    if failed:
        raise typer.Exit(1)


def run_part(command: Sequence[str], job: Job, log: Path) -> list[dict[str, Any]]:
    """Run `command`, which appends to the job's file; kill it and all it started when the job's time is up.

    In a process group of its own: a kernel that reads outside its memory breaks its process's CUDA context for good,
    and one that never ends can only be killed. Either, or a status other than 0, is a problem. Returns what was found.
    """
    job.file.touch()
    known = job.file.stat().st_size
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with log.open("ab") as output:
        output.write(f"{' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=ROOT, process_group=0
        )
    try:
        how = f"ended with status {process.wait(job.seconds)}"
    except subprocess.TimeoutExpired:
        how = f"not done after {job.seconds:.0f} s and killed"
    finally:
        # Its servers too, whichever way it ended.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != 0:
        with job.file.open("a") as rows:
            rows.write("\n")  # if it was killed within a line, the next one is a line of its own
        job.tell(problem=f"{how}: {log.read_text(errors='replace').strip().splitlines()[-1]}")
    return read(job.file, known)


def gpu_part(
    name: Annotated[str, typer.Argument(help="The part.")],
    rows: Annotated[Path, typer.Option(help="Append findings to this file.")],
    run: Annotated[str, typer.Option(help="The run's name.")],
    seconds: Annotated[float, typer.Option(help="Of tests, begin none after so many.")],
    file: Annotated[str, typer.Argument(help="Of tests, the file.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tiny shapes on the CPU.")] = False,
) -> None:
    """Run one part of gpu-check in this process."""
    part = PARTS[name]
    module, function = part.function.split(":")
    job = Job(DRY if dry_run else FULL, rows, run, part.table, seconds)
    getattr(importlib.import_module(f"loadtest.gpu.{module}"), function)(job, *[file] * bool(part.files))


def require_device() -> None:
    """Raises ValueError with the way out where there is no GPU."""
    try:
        import torch
    except ImportError:
        raise ValueError(f"{sys.executable} has no torch; give `make gpu-check` a PYTHON with a CUDA build") from None
    if not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no CUDA device (--dry-run runs the check on the CPU)")


def checked_out() -> str:
    """The commit of this checkout, marked if files differ from it; "unknown" where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"

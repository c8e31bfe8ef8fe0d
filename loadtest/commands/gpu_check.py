"""`python -m loadtest gpu-check`, and `gpu-part`, which it runs for each part."""

from __future__ import annotations

import datetime
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.commands.options import JsonFile
from loadtest.console import emit, err, show_findings
from loadtest.gpu.document import block, update
from loadtest.gpu.job import Job, OutOfTime
from loadtest.gpu.part import BLOCKS, PARTS, Part, limit, run_part, soft_limit
from loadtest.gpu.report import Findings, Report, Row
from loadtest.gpu.shape import FULL, REHEARSAL

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "gpu.md"
# Modules that import torch: only a part's own process imports one.
PLACES = {
    "machine": "machine:machine",
    "tests": "kernel_tests:kernel_tests",
    "steps": "steps:steps",
    "invariant": "steps:invariant",
    "gemm": "gemm:gemm",
    "peers": "peers:peers",
    "served": "served:served",
    "smollm2": "served:smollm2",
}


class NoDevice(Exception):
    """There is nothing to check on this machine."""


def gpu_check(
    only: Annotated[
        str, typer.Option(help=f"Blocks to check, separated by commas: {', '.join(BLOCKS)}. [default: all]")
    ] = "",
    minutes: Annotated[float, typer.Option(min=0.05, help="Most minutes that all may take together.")] = 7.5,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The same code with tiny shapes on the CPU; its figures mean nothing.")
    ] = False,
    document: Annotated[
        Path | None, typer.Option(help="Write the rows into this file. [default: docs/gpu.md; none in a dry run]")
    ] = None,
    commit: Annotated[str, typer.Option(help="What was checked. [default: what git says]")] = "",
    json_file: JsonFile = None,
) -> None:
    """Check and measure the GPU path on this machine, without a network, and write the rows into docs/gpu.md.

    Tests of every kernel, served mixed batches, and the table of decoding steps beside bitsandbytes + PEFT and the
    floor of the memory's bandwidth. Parts run in processes of their own; a failure is a row that says so, and the
    status is then 1; 2 without a GPU.

    Example:

    `python -m loadtest gpu-check --only steps,gemm --minutes 4`
    """
    wanted = [name for name in only.split(",") if name] or list(BLOCKS)
    if unknown := [name for name in wanted if name not in BLOCKS]:
        raise typer.BadParameter(f"--only takes {', '.join(BLOCKS)}, not {', '.join(unknown)}")
    if not dry_run:
        require_device()
        document = document or DOCUMENT
    end = time.monotonic() + 60 * minutes
    # The machine is always described: its row is what the others are stamped with.
    parts = [part for part in PARTS if part.block in wanted or part.name == "machine"]
    blocks: dict[str, Findings] = {}
    with tempfile.TemporaryDirectory(prefix="loramux-gpu-check-") as scratch:
        machine: Row = {}
        for i, part in enumerate(parts):
            seconds = limit(part, parts[i + 1 :], end - time.monotonic())
            err.print(f"{part.name}: at most {seconds:.0f} s …")
            found = check(part, Path(scratch), seconds, dry_run, 1e9 * float(machine.get("GB/s") or 0))
            if part.name == "machine":
                machine = found.rows[0] if found.rows else {}
            show_findings(part.name, found)
            merge(blocks.setdefault(part.block, Findings()), found)
    device = str(machine.get("device", "unknown device"))
    written = stamp(machine, commit or checked_out())
    if document is not None:
        update(document, device, {name: block(name, device, written, found) for name, found in blocks.items()})
        err.print(f"written to {document}", soft_wrap=True)
    failed = any(found.problems for found in blocks.values())
    results = {name: asdict(found) for name, found in blocks.items()}
    emit({"verdict": "fail" if failed else "pass", "stamp": written, "device": device, "blocks": results}, json_file)
    if failed:
        raise typer.Exit(1)


def gpu_part(
    name: Annotated[str, typer.Argument(help="The part.")],
    rows: Annotated[Path, typer.Option(help="Append findings to this file.")],
    seconds: Annotated[float, typer.Option(help="Begin nothing after so many.")],
    bandwidth: Annotated[float, typer.Option(help="The device's, in bytes a second; 0 if unknown.")] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tiny shapes on the CPU.")] = False,
) -> None:
    """Run one part of gpu-check in this process."""
    module, function = PLACES[name].split(":")
    begin = time.monotonic()
    run: Callable[[Job], None] = getattr(importlib.import_module(f"loadtest.gpu.{module}"), function)
    report = Report(rows)
    try:
        run(Job(REHEARSAL if dry_run else FULL, report, begin + seconds, bandwidth))
    except OutOfTime:
        report.problem(f"{name}: time was up after {time.monotonic() - begin:.0f} s; what is missing was not measured")


def require_device() -> None:
    """Raises NoDevice with the way out."""
    try:
        import torch
    except ImportError:
        raise NoDevice(
            f"{sys.executable} has no torch; give `make gpu-check` a PYTHON with a CUDA build of it"
        ) from None
    if not torch.cuda.is_available():
        raise NoDevice(
            f"torch {torch.__version__} sees no CUDA device; gpu-check needs one (--dry-run runs it on the CPU)"
        )


def check(part: Part, scratch: Path, seconds: float, dry_run: bool, bandwidth: float) -> Findings:
    """Run a part in a process of its own."""
    rows = scratch / f"{part.name}.jsonl"
    command = [sys.executable, "-m", "loadtest", "gpu-part", part.name, "--rows", str(rows)]
    command += ["--seconds", f"{soft_limit(seconds):.1f}", "--bandwidth", f"{bandwidth:.0f}"]
    if dry_run:
        command.append("--dry-run")
    return run_part(command, rows, scratch / f"{part.name}.log", seconds)


def merge(block: Findings, part: Findings) -> None:
    """Add a part's findings to those of its block."""
    block.rows += part.rows
    block.notes += part.notes
    block.problems += part.problems


def stamp(machine: Mapping[str, Any], commit: str) -> str:
    """When, and with what."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = [
        f"{name} {machine.get(name, '?')}" for name in ("driver", "torch", "triton", "transformers", "bitsandbytes")
    ]
    return f"{today}, {', '.join(versions)}, loramux {commit}"


def checked_out() -> str:
    """The commit of this checkout, marked if files differ from it; the version where there is no git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        try:
            return f"{metadata.version('loramux')}, commit unknown"
        except metadata.PackageNotFoundError:
            return "commit unknown"
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")

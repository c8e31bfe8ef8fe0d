"""`python -m loadtest gpu-check`, and `gpu-part`, which it runs for each part."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.console import emit, err
from loadtest.gpu.parts import (
    ARCHIVE,
    CACHE,
    FIRST,
    KERNELS,
    PARTS,
    ROOT,
    SECOND,
    commands,
    run_part,
    soft_limit,
)
from loadtest.gpu.report import Job, OutOfTime, Report, cell, read, render, update
from loadtest.gpu.scale import DRY, FULL

DOCUMENT = ROOT / "docs" / "gpu.md"
LEAST = 2.0  # seconds in which a part can do anything


class NoDevice(Exception):
    """There is nothing to check on this machine."""


def gpu_check(
    parts: Annotated[str, typer.Option(help=f"Parts, in this order: {', '.join(PARTS)}; or none. [default: all]")] = "",
    first: Annotated[bool, typer.Option("--first", help=f"The first run: {', '.join(FIRST)}.")] = False,
    second: Annotated[bool, typer.Option("--second", help=f"The second run: {', '.join(SECOND)}.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="Most seconds that all may take together.")] = 300,
    out: Annotated[
        Path, typer.Option(envvar="GPU_CHECK_OUT", help="The output folder; lines are added to those that it has.")
    ] = CACHE / "out",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The same code with tiny shapes on the CPU; its figures mean nothing.")
    ] = False,
    commit: Annotated[str, typer.Option(help="What is checked. [default: what git says]")] = "",
    document: Annotated[
        bool, typer.Option("--document", help="Write all runs of the folder into docs/gpu.md.")
    ] = False,
) -> None:
    """Check and measure the GPU path on this machine, without a network.

    Each part is a process of its own. What it finds is added at once to rows.jsonl in the output folder; gpu.md and
    gpu.json are written again after each part. A failure is a row that says so, and the status is then 1; 2 without a
    GPU.

    Example:

    `python -m loadtest gpu-check --first --seconds 200 --out results`
    """
    end = time.monotonic() + seconds
    names = FIRST if first else SECOND if second else tuple(PARTS) if not parts else ()
    names = names or tuple(name for name in parts.split(",") if name not in ("", "none"))
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"--parts takes {', '.join(PARTS)}, not {', '.join(unknown)}")
    if names and not dry_run:
        require_device()
    out.mkdir(parents=True, exist_ok=True)
    rows, run = out / "rows.jsonl", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if names:
        Report(rows, run, "machine").commit(commit or checked_out())
        os.environ.setdefault("TRITON_CACHE_DIR", str(KERNELS))
        unpack(CACHE / ARCHIVE)
    passed = True
    for name in names:
        for title, arguments in commands(name):
            limit = min(PARTS[name].seconds * (3 if dry_run else 1), end - time.monotonic())
            report = Report(rows, run, PARTS[name].table)
            if limit < LEAST:
                report.problem(f"{title}: no time was left")
                err.print(f"{title}: no time was left", style="red")
                passed = False
                continue
            err.print(f"{title}: at most {limit:.0f} s …")
            options = ["--rows", str(rows), "--run", run, "--seconds", f"{soft_limit(limit):.1f}"]
            command = [sys.executable, "-m", "loadtest", "gpu-part", *arguments, *options, *["--dry-run"] * dry_run]
            passed &= run_part(command, report, out / "log", limit, show)
            write(out)
    text = write(out)
    if document:
        update(DOCUMENT, text)
    emit({"verdict": "pass" if passed else "fail", "run": run, "out": str(out)})
    if not passed:
        raise typer.Exit(1)


def unpack(archive: Path) -> None:
    """Kernels that an earlier run has packed, if there are any; without them they are compiled."""
    try:
        with tarfile.open(archive) as packed:
            packed.extractall(os.environ["TRITON_CACHE_DIR"], filter="data")
        err.print(f"kernels from {archive}", soft_wrap=True)
    except FileNotFoundError:
        pass
    except (tarfile.TarError, OSError, EOFError) as error:
        err.print(f"{archive}: {error}", style="red", soft_wrap=True)


def write(out: Path) -> str:
    """gpu.md and gpu.json of all lines so far; returns the first."""
    runs = read(out / "rows.jsonl")
    (out / "gpu.md").write_text(text := render(runs))
    (out / "gpu.json").write_text(json.dumps([asdict(run) for run in runs]) + "\n")
    return text


def show(line: dict[str, Any]) -> None:
    """A finding, as it comes."""
    for what, style in (("row", ""), ("note", "dim"), ("problem", "red")):
        if what in line:
            found = line[what]
            text = ", ".join(f"{k}: {cell(v)}" for k, v in found.items() if v != "") if what == "row" else found
            err.print(f"  {line['table']}: {text}", style=style, soft_wrap=True, markup=False)


def gpu_part(
    name: Annotated[str, typer.Argument(help="The part.")],
    file: Annotated[str, typer.Argument(help="Of tests, the file.")] = "",
    rows: Annotated[Path, typer.Option(help="Append findings to this file.")] = Path("rows.jsonl"),
    run: Annotated[str, typer.Option(help="The run's name.")] = "",
    seconds: Annotated[float, typer.Option(help="Begin nothing after so many.")] = 60,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tiny shapes on the CPU.")] = False,
) -> None:
    """Run one part of gpu-check in this process."""
    begin, part = time.monotonic(), PARTS[name]
    module, function = part.function.split(":")
    start: Callable[..., None] = getattr(importlib.import_module(f"loadtest.gpu.{module}"), function)
    report = Report(rows, run, part.table)
    machine = next((r.machine for r in reversed(read(rows)) if r.machine), {})
    job = Job(DRY if dry_run else FULL, report, begin + seconds, 1e9 * float(machine.get("GB/s") or 0))
    try:
        start(job, *[file] * bool(part.files))
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


def checked_out() -> str:
    """The commit of this checkout, marked if files differ from it; "unknown" where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

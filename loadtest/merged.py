"""What merging an adapter into the base does: the export's error, and tokens per second against the same in the batch.

Knows the command line and servers; no tensors.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loadtest.bench import BenchSpec, bench
from loadtest.cells import Cell
from loadtest.commands.options import connect
from loadtest.console import err
from loadtest.server_process import ServerAddress, serve
from loadtest.target import Target

CELLS = (Cell("c1", 1, 1), Cell("c16", 16, 1, rounds=2))


def export_error(model: str, adapter: Path, dtype: str, work: Path) -> float:
    """‖W' − (W + ΔW)‖ / ‖ΔW‖ over all changed layers of a real export, in per cent. Raises ValueError if it fails."""
    out = work / f"merged-{dtype}"
    command = [sys.executable, "-m", "loramux", "merge", adapter.name, "--out", str(out), "--dtype", dtype]
    command += ["--model", model, "--adapter-dir", str(adapter.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"merging {adapter} to {dtype} failed: {done.stderr.strip()[-500:]}")
    report = json.loads((out / "merge_report.json").read_text())
    return 100.0 * float(report["overall_error"])


def batched_and_merged(model: str, adapter: Path, work: Path, runs: int) -> dict[str, tuple[list[float], list[float]]]:
    """Output tokens/s of each cell in the batch and merged, `runs` times in turn, on two servers side by side."""
    arguments = ["--model", model, "--adapter-dir", str(adapter.parent), "--kv-memory", "256MiB"]
    with ExitStack() as stack:
        addresses = []
        for name, extra in (("batched", ["--adapter", adapter.name]), ("merged", ["--merged", adapter.name])):
            folder = work / f"server-{name}"
            folder.mkdir()
            err.print(f"starting loramux serve {' '.join(arguments + extra)}", soft_wrap=True)
            addresses.append(stack.enter_context(serve([*arguments, *extra, "--log-level", "warning"], folder)))
        return asyncio.run(_measure(addresses, adapter.name, runs))


async def _measure(
    addresses: Sequence[ServerAddress], name: str, runs: int
) -> dict[str, tuple[list[float], list[float]]]:
    rates: dict[str, tuple[list[float], list[float]]] = {cell.name: ([], []) for cell in CELLS}
    async with (
        connect(addresses[0].target, addresses[0].admin) as batched,
        connect(addresses[1].target, addresses[1].admin) as merged,
    ):
        for i in range(runs):
            for cell in CELLS:
                for target, found in zip((batched, merged), rates[cell.name], strict=True):
                    found.append(await _rate(target, cell, name, i))
    return rates


async def _rate(target: Target, cell: Cell, name: str, seed: int) -> float:
    workload = cell.workload(await target.vocab_size(), (name,), seed)
    summary: dict[str, Any] = await bench(target, BenchSpec(workload, cell.concurrency, warmup=cell.concurrency))
    if summary["failed"]:
        raise ValueError(f"{cell.name}: {summary['failed']} requests failed: {summary['errors']}")
    return cell.rate(summary)

"""`python -m loadtest bench`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from loadtest.adapters import write_adapters
from loadtest.bench import BenchSpec, bench, load_folders
from loadtest.cells import CELLS, Cell
from loadtest.commands.options import ModelOption, SeedOption, connect
from loadtest.commands.peers import warn_if_busy
from loadtest.console import err, progress, show_cells, show_kernels
from loadtest.kernels import kernels, machine
from loadtest.peers.llama_peer import LlamaServer, LlamaUnavailable, llama_server
from loadtest.server_process import ServerAddress, serve
from loadtest.shapes import linear_shapes, read_config
from loadtest.target import Target
from loadtest.workload import plan

RATIO_CELL = "serve_c16_a16"
ADAPTERS = 16
RANK = 16
SLOTS = 32
VOCABULARY_OF_PLANS = 32_000
Rates = dict[str, list[float]]


def run_bench(
    model: ModelOption = "smollm2",
    runs: Annotated[int, typer.Option(min=1, help="Measure everything so often; the median counts.")] = 5,
    only: Annotated[str, typer.Option(help="kernels, served or all.")] = "all",
    peft: Annotated[bool, typer.Option(help="Measure PEFT as well (minutes).")] = True,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Folder with llama-server and llama-quantize: measure llama.cpp as well.")
    ] = None,
    llama_gguf: Annotated[Path | None, typer.Option(help="The same model as a GGUF file, for llama.cpp.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure the operations, the served workload and its peers on this machine, in one run.

    The last lines of stdout are JSON objects, one a line.

    Examples:

    `python -m loadtest bench --runs 3 --only kernels`

    `python -m loadtest bench --llama-cpp /opt/llama.cpp/bin --llama-gguf SmolLM2-135M-Instruct.Q4_1.gguf`
    """
    if only not in ("all", "kernels", "served"):
        raise typer.BadParameter("--only takes kernels, served or all")
    if (llama_cpp is None) != (llama_gguf is None):
        raise typer.BadParameter("llama.cpp needs both --llama-cpp and --llama-gguf")
    if llama_cpp is not None and llama_gguf is not None:
        for file in (llama_cpp / "llama-server", llama_cpp / "llama-quantize", llama_gguf):
            if not file.is_file():
                raise typer.BadParameter(f"llama.cpp: there is no file {file}")
    warn_if_busy()
    lines: list[dict[str, Any]] = []
    if only != "served":
        measured = [*machine(runs), *kernels(runs)]
        show_kernels(measured)
        lines += measured
    if only != "kernels":
        with tempfile.TemporaryDirectory(prefix="loramux-bench-") as scratch:
            lines += served(model, Path(scratch), runs, seed, peft=peft, llama_cpp=llama_cpp, llama_gguf=llama_gguf)
    for line in lines:
        print(json.dumps(line))


def served(
    model: str, scratch: Path, runs: int, seed: int, *, peft: bool, llama_cpp: Path | None, llama_gguf: Path | None
) -> list[dict[str, Any]]:
    """Every cell through a server of its own, and through the peers that there are; one line a cell and peer."""
    root = scratch / "adapters"
    folders = write_adapters(root, linear_shapes(read_config(model)), count=ADAPTERS, ranks=[RANK], seed=seed)
    with serve(["--model", model, "--adapter-dir", str(root), "--log-level", "warning"], scratch) as address:
        ours = asyncio.run(measure(address, folders, runs, seed))
    peers: dict[str, Rates] = {}
    if llama_cpp is not None and llama_gguf is not None:
        peers["llama.cpp"] = measure_llama(llama_cpp, llama_gguf, folders, scratch, runs, seed)
    if peft:
        peers["peft"] = measure_peft(model, root, min(runs, 3), seed)
    show_cells(CELLS, ours, peers)
    lines = [line(cell.name, ours[cell.name], cell.unit) for cell in CELLS]
    for peer, rates in peers.items():
        lines += [line(f"{peer}:{name}", found, "tokens/s") for name, found in rates.items()]
    best = max((median(rates[RATIO_CELL]) for rates in peers.values() if RATIO_CELL in rates), default=None)
    if best is not None:
        lines.append(line("peer_ratio_c16_a16", [rate / best for rate in ours[RATIO_CELL]], "times the best peer"))
    return lines


def line(name: str, runs: list[float], unit: str) -> dict[str, Any]:
    """One result, ready for JSON."""
    return {"bench": name, "value": round(median(runs), 2), "unit": unit, "runs": [round(run, 2) for run in runs]}


async def measure(address: ServerAddress, folders: list[Path], runs: int, seed: int) -> Rates:
    """Tokens per second of each cell, `runs` times in turn. Raises ValueError if a request fails."""
    rates: Rates = {cell.name: [] for cell in CELLS}
    async with connect(address.target, address.admin) as server:
        names = tuple(await load_folders(server, folders))
        vocab_size = await server.vocab_size()
        with progress() as bar:
            task = bar.add_task("served", total=runs * len(CELLS), note="")
            for i in range(runs):
                for cell in CELLS:
                    rates[cell.name].append(await one_run(server, cell, vocab_size, names, seed + i))
                    bar.update(task, advance=1, note=f"{cell.name}: {rates[cell.name][-1]:,.1f} {cell.unit}")
    return rates


async def one_run(server: Target, cell: Cell, vocab_size: int, names: tuple[str, ...], seed: int) -> float:
    """Drive one cell once, after a short warm-up."""
    workload = cell.workload(vocab_size, names, seed)
    summary = await bench(server, BenchSpec(workload, cell.concurrency, warmup=cell.concurrency))
    if summary["failed"]:
        raise ValueError(f"{cell.name}: {summary['failed']} requests failed: {summary['errors']}")
    return cell.rate(summary)


def measure_llama(binaries: Path, gguf: Path, folders: list[Path], scratch: Path, runs: int, seed: int) -> Rates:
    """The same cells through llama.cpp's server; what it cannot do is left out, with the reason on stderr."""
    rates: Rates = {cell.name: [] for cell in CELLS}
    try:
        with (
            llama_server(
                binaries, gguf, folders, scratch, slots=SLOTS, slot_tokens=1024, threads=os.cpu_count() or 1
            ) as server,
            progress() as bar,
        ):
            task = bar.add_task("llama.cpp", total=runs * len(CELLS), note="")
            for i in range(runs):
                for cell in CELLS:
                    rates[cell.name].append(one_llama_run(server, cell, folders, seed + i))
                    bar.update(task, advance=1, note=f"{cell.name}: {rates[cell.name][-1]:,.1f} {cell.unit}")
    except LlamaUnavailable as reason:
        err.print(f"[yellow]llama.cpp: {reason}")
    return {name: found for name, found in rates.items() if found}


def one_llama_run(server: LlamaServer, cell: Cell, folders: list[Path], seed: int) -> float:
    """One cell once."""
    workload = cell.workload(VOCABULARY_OF_PLANS, tuple(folder.name for folder in folders), seed)
    return server.rate(plan(workload), cell.concurrency, counts_prompt=cell.counts_prompt)


def measure_peft(model: str, root: Path, runs: int, seed: int) -> Rates:
    """PEFT in a process of its own, whose threads end with it: the cell that the ratio is taken from, and its base."""
    rates: Rates = {}
    for name, adapters in ((RATIO_CELL, ADAPTERS), ("serve_c16_base", 0)):
        command = [sys.executable, "-m", "loadtest", "peers", "peft", "--model", model, "--adapter-dir", str(root)]
        command += ["--adapters", str(adapters), "--concurrency", "16", "--runs", str(runs), "--seed", str(seed)]
        err.print(f"PEFT, {adapters} adapters …")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            err.print(f"[yellow]PEFT: {done.stderr.strip()[-300:]}")
            continue
        found: Mapping[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        rates[name] = found["output_throughput_runs"]
    return rates

"""`python -m loadtest bench`."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from contextlib import closing
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
from loadtest.peers.llama_peer import LlamaPeer
from loadtest.peers.peer import Peer, PeerUnavailable
from loadtest.peers.peft_process import PeftProcess
from loadtest.peers.vllm_peer import VllmPeer
from loadtest.server_process import ServerAddress, serve
from loadtest.shapes import linear_shapes, read_config
from loadtest.target import Target

RATIO_CELL = "serve_c16_a16"
ADAPTERS = 16
RANK = 16
SLOTS = 32
SLOT_TOKENS = 1024
PEFT_CELLS = ("serve_c16_base", RATIO_CELL)
PEFT_RUNS = 3  # it takes minutes
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
    vllm: Annotated[Path | None, typer.Option(help="Virtual environment with bin/vllm: measure vLLM as well.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure the operations, the served workload and its peers on this machine, in one run.

    The last lines of stdout are JSON objects, one a line.

    Examples:

    `python -m loadtest bench --runs 3 --only kernels`

    `python -m loadtest bench --llama-cpp /opt/llama.cpp/bin --llama-gguf SmolLM2-135M-Instruct.Q4_1.gguf`

    `python -m loadtest bench --only served --vllm /opt/vllm`
    """
    if only not in ("all", "kernels", "served"):
        raise typer.BadParameter("--only takes kernels, served or all")
    if (llama_cpp is None) != (llama_gguf is None):
        raise typer.BadParameter("llama.cpp needs both --llama-cpp and --llama-gguf")
    if llama_cpp is not None and llama_gguf is not None:
        for file in (llama_cpp / "llama-server", llama_cpp / "llama-quantize", llama_gguf):
            if not file.is_file():
                raise typer.BadParameter(f"llama.cpp: there is no file {file}")
    if vllm is not None and not (vllm / "bin" / "vllm").is_file():
        raise typer.BadParameter(f"vLLM: there is no file {vllm / 'bin' / 'vllm'}")
    warn_if_busy()
    lines: list[dict[str, Any]] = []
    if only != "served":
        measured = [*machine(runs), *kernels(runs)]
        show_kernels(measured)
        lines += measured
    if only != "kernels":
        with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
            scratch = Path(folder)
            root = scratch / "adapters"
            shapes = linear_shapes(read_config(model))
            adapters = write_adapters(root, shapes, count=ADAPTERS, ranks=[RANK], seed=seed)
            peers: list[Peer] = []
            if llama_cpp is not None and llama_gguf is not None:
                peers.append(LlamaPeer(llama_cpp, llama_gguf, adapters, scratch, CELLS, runs, SLOTS, SLOT_TOKENS))
            if vllm is not None:
                peers.append(VllmPeer(vllm, model, adapters, RANK, scratch, CELLS, runs, SLOTS, SLOT_TOKENS))
            if peft:
                cells = [cell for cell in CELLS if cell.name in PEFT_CELLS]
                peers.append(PeftProcess(model, root, cells, min(runs, PEFT_RUNS)))
            lines += served(model, adapters, scratch, peers, runs, seed)
    for line in lines:
        print(json.dumps(line))


def served(
    model: str, folders: list[Path], scratch: Path, peers: Sequence[Peer], runs: int, seed: int
) -> list[dict[str, Any]]:
    """Every cell through a server of its own, then through the peers; one line a cell and peer."""
    root = folders[0].parent
    with serve(["--model", model, "--adapter-dir", str(root), "--log-level", "warning"], scratch) as address:
        ours = asyncio.run(measure(address, folders, runs, seed))
    theirs = {peer.name: measure_peer(peer, seed) for peer in peers}
    show_cells(CELLS, ours, theirs)
    lines = [line(cell.name, ours[cell.name], cell.unit) for cell in CELLS]
    for name, rates in theirs.items():
        lines += [line(f"{name}:{cell}", found, "tokens/s") for cell, found in rates.items()]
    best = max((median(rates[RATIO_CELL]) for rates in theirs.values() if RATIO_CELL in rates), default=None)
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


def measure_peer(peer: Peer, seed: int) -> Rates:
    """The rates of its cells; what it could not do is left out, with the reason on stderr."""
    rates: Rates = {}
    with progress() as bar, closing(peer.measure(seed)) as measured:
        task = bar.add_task(peer.name, total=peer.runs * len(peer.cells), note="starting")
        try:
            for cell, rate in measured:
                rates.setdefault(cell, []).append(rate)
                bar.update(task, advance=1, note=f"{cell}: {rate:,.1f} tokens/s")
        except PeerUnavailable as reason:
            # Its words are a log's: no markup, and whole lines.
            err.print(f"{peer.name}: {reason}", style="yellow", soft_wrap=True)
    return rates

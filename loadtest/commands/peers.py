"""`python -m loadtest peers peft` and `python -m loadtest compare`."""

from __future__ import annotations

import asyncio
import os
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from loadtest.bench import BenchSpec, adapter_folders, bench
from loadtest.commands.options import (
    ADMIN,
    PUBLIC,
    AdminOption,
    JsonFile,
    ModelOption,
    OutputLen,
    PromptLen,
    SeedOption,
    TargetOption,
    connect,
)
from loadtest.commands.run import load_with_bar
from loadtest.console import emit, err, progress, show_comparison
from loadtest.peers.peft_peer import PeftPeer, build
from loadtest.workload import WorkloadSpec, plan


class BaseWeights(StrEnum):
    """What PEFT computes the base with."""

    fastest = "fastest"
    nf4 = "nf4"
    dense = "dense"


AdapterDir = Annotated[Path, typer.Option(help="Folder of PEFT adapters, as `python -m loadtest adapters` makes it.")]
Adapters = Annotated[int, typer.Option(min=0, help="Take the first N of them; 0 is the base alone.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Sequences in the batch.")]
Runs = Annotated[int, typer.Option(min=1, help="Measure so often, with new prompts; report the median.")]
Weights = Annotated[
    BaseWeights, typer.Option(help="PEFT's base: NF4, dequantized once to bf16, or whichever is faster.")
]


Threads = Annotated[int | None, typer.Option(min=1, help="PEFT's CPU threads. [default: torch's choice]")]


def peft(
    adapter_dir: AdapterDir,
    model: ModelOption = "smollm2",
    adapters: Adapters = 16,
    concurrency: Concurrency = 16,
    prompt_len: PromptLen = 64,
    output_len: OutputLen = 64,
    runs: Runs = 3,
    weights: Weights = BaseWeights.fastest,
    threads: Threads = None,
    seed: SeedOption = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure PEFT: one static mixed batch (`adapter_names`), greedy, of exact lengths.

    Example:

    `python -m loadtest peers peft --adapter-dir /tmp/adapters --adapters 16 --concurrency 16`
    """
    folders = adapter_folders(adapter_dir)[:adapters]
    load = warn_if_busy()
    err.print("building PEFT models …")
    peer = build(model, folders, weights.value, concurrency=concurrency, prompt_len=prompt_len, threads=threads)
    rates = []
    with progress() as bar:
        task = bar.add_task(f"PEFT, {peer.weights}", total=runs, note="")
        for i in range(runs):
            workload = one_batch(concurrency, prompt_len, output_len, peer.vocab_size, seed + i)
            rates.append(peer_rate(peer, workload))
            bar.update(task, advance=1, note=f"{rates[-1]:,.1f} tokens/s")
    emit({**peer_fields(peer, rates, concurrency), "load_before": load}, json_file)


def compare(
    adapter_dir: AdapterDir,
    target: TargetOption = PUBLIC,
    admin: AdminOption = ADMIN,
    model: ModelOption = "smollm2",
    adapters: Adapters = 16,
    concurrency: Concurrency = 16,
    prompt_len: PromptLen = 64,
    output_len: OutputLen = 64,
    runs: Runs = 3,
    weights: Weights = BaseWeights.fastest,
    threads: Threads = None,
    seed: SeedOption = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure a server and PEFT in turn, on the same machine, adapters and prompts; show both.

    Example, with `loramux serve --adapter-dir /tmp/adapters` running:

    `python -m loadtest compare --adapter-dir /tmp/adapters --adapters 16 --concurrency 16`
    """
    folders = adapter_folders(adapter_dir)[:adapters]
    load = warn_if_busy()
    err.print("building PEFT models …")
    peer = build(model, folders, weights.value, concurrency=concurrency, prompt_len=prompt_len, threads=threads)

    async def go() -> tuple[list[dict[str, Any]], list[float]]:
        ours: list[dict[str, Any]] = []
        theirs: list[float] = []
        async with connect(target, admin) as server:
            names = tuple(await load_with_bar(server, folders)) if folders else ()
            vocab_size = await server.vocab_size()
            with progress() as bar:
                task = bar.add_task("runs", total=runs, note="")
                for i in range(runs):
                    workload = one_batch(concurrency, prompt_len, output_len, vocab_size, seed + i, names)
                    # In turn, not at once: whatever else the machine does falls on both alike.
                    ours.append(await bench(server, BenchSpec(workload, concurrency, warmup=concurrency)))
                    theirs.append(peer_rate(peer, workload))
                    note = f"loramux {ours[-1]['output_throughput']:,.1f}, PEFT {theirs[-1]:,.1f} tokens/s"
                    bar.update(task, advance=1, note=note)
        return ours, theirs

    runs_of_ours, rates = asyncio.run(go())
    ours = median_run(runs_of_ours)
    theirs = peer_fields(peer, rates, concurrency)
    ratio = ours["output_throughput"] / theirs["output_throughput"]
    show_comparison(ours, theirs)
    emit({**ours, "peft": theirs, "ratio": ratio, "load_before": load}, json_file)
    if ours["failed"]:
        raise typer.Exit(1)


def one_batch(
    concurrency: int, prompt_len: int, output_len: int, vocab_size: int, seed: int, names: tuple[str, ...] = ()
) -> WorkloadSpec:
    """Return the workload of one static batch: all requests at once, adapters in turn."""
    return WorkloadSpec(concurrency, prompt_len, output_len, vocab_size, names, seed=seed)


def peer_rate(peer: PeftPeer, workload: WorkloadSpec) -> float:
    """Run a workload through the peer as one batch and return output tokens per second."""
    prompts = [request.prompt_ids for request in plan(workload)]
    return len(prompts) * workload.output_len / peer.generate(prompts, workload.output_len).seconds


def peer_fields(peer: PeftPeer, rates: list[float], concurrency: int) -> dict[str, Any]:
    """Return a peer's result, ready for JSON."""
    return {
        "peer": "peft",
        "weights": peer.weights,
        "adapters": len(peer.names),
        "max_concurrency": concurrency,
        "output_throughput": median(rates),
        "output_throughput_runs": [round(rate, 1) for rate in rates],
    }


def median_run(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run of median throughput (of two middle ones, the slower), with failures of all runs."""
    ordered = sorted(summaries, key=lambda summary: float(summary["output_throughput"]))
    return {
        **ordered[(len(ordered) - 1) // 2],
        "failed": sum(summary["failed"] for summary in summaries),
        "output_throughput_runs": [round(summary["output_throughput"], 1) for summary in summaries],
    }


def warn_if_busy() -> float:
    """Return the machine's load of the last minute, and say so if others use it.

    PEFT's threads wait for each other at every layer, so one busy core slows it far more than it slows the server.
    """
    load = os.getloadavg()[0]
    if load > 0.25 * (os.cpu_count() or 1):
        err.print(
            f"The load of this machine is {load:.1f}: figures taken now flatter whoever waits less.", style="yellow"
        )
    return load

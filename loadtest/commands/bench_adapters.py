"""`python -m loadtest bench-adapters`."""

from __future__ import annotations

import asyncio
import json
import tempfile
import zlib
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from loadtest.adapters import WEIGHTS_FILE, link_adapters, write_adapters
from loadtest.commands.bench import line
from loadtest.commands.options import ModelOption, SeedOption, connect
from loadtest.commands.peers import warn_if_busy
from loadtest.console import err, progress, show_hotswap, show_registered
from loadtest.hotswap import HotSwap, SwapLog, SwapSpec
from loadtest.merged import batched_and_merged, export_error
from loadtest.registered import Popularity, registered_run
from loadtest.report import rounded
from loadtest.server_process import ServerAddress, serve
from loadtest.shapes import linear_shapes, read_config
from loadtest.target import Target
from loadtest.trend import MIB

RANKS = (8, 16, 32, 64)
FEW = 5
Summaries = dict[Popularity, list[dict[str, Any]]]


def run_bench_adapters(
    model: ModelOption = "smollm2",
    adapters: Annotated[int, typer.Option(min=FEW + 1, help="How many the large server knows.")] = 2000,
    distinct: Annotated[
        int, typer.Option(min=2 * len(RANKS), help="How many different ones are written; the others are hard links.")
    ] = 64,
    budget_for: Annotated[
        int, typer.Option(min=FEW, help="--adapter-memory of both servers: room for so many of mean size.")
    ] = 40,
    requests: Annotated[int, typer.Option(min=1, help="Requests of one measured run.")] = 160,
    warmup: Annotated[int, typer.Option(min=1, help="Brief requests before each run, to fill the tiers.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Measure every popularity so often; the median counts.")] = 3,
    swap_seconds: Annotated[
        float, typer.Option(min=1.0, help="Seconds of streams without operations, and as many with them.")
    ] = 60.0,
    merge_adapter: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="The adapter that is merged; it must fit the model.")
    ] = Path("adapters/date"),
    scratch: Annotated[
        Path | None,
        typer.Option(help="Keep the different adapters here for the next time. [default: a temporary folder]"),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure thousands of registered adapters against a few, what hot swaps cost running streams, and merging.

    Ends with 1 if any request or operation failed. The last lines of stdout are JSON objects, one a line.

    Examples:

    `python -m loadtest bench-adapters --scratch /var/tmp/loramux`

    `python -m loadtest bench-adapters --adapters 40 --distinct 8 --budget-for 5 --runs 1 --swap-seconds 10`
    """
    if distinct % len(RANKS):
        raise typer.BadParameter(f"--distinct takes a multiple of {len(RANKS)}: as many of each rank")
    warn_if_busy()
    with ExitStack() as stack:
        if scratch is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loramux-bench-")))
        scratch.mkdir(parents=True, exist_ok=True)
        # Beside the different ones: hard links do not leave a file system.
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix="run-")))
        written = write_distinct(scratch, model, distinct, seed)
        sizes = [(folder / WEIGHTS_FILE).stat().st_size for folder in written]
        err.print(
            f"{adapters:,} adapters of ranks {', '.join(map(str, RANKS))} in turn on all linears; their weights are "
            f"hard links to {distinct} files of {sum(sizes) / MIB:,.0f} MiB together: the page cache sees no more, "
            "and digests repeat",
            soft_wrap=True,
        )
        budget = budget_for * sum(sizes) // distinct
        lines = registered(model, written, work, adapters, budget_for, budget, requests, warmup, runs)
        lines += hotswap(model, written, work, swap_seconds, seed)
        lines += merge(model, merge_adapter.resolve(), work, runs)
    for fields in lines:
        print(json.dumps(fields))
    if any(fields.get("failed") for fields in lines):
        raise typer.Exit(1)


def merge(model: str, adapter: Path, work: Path, runs: int) -> list[dict[str, Any]]:
    """The error of two exports of one adapter, and its speed merged against the same in the batch."""
    lines = [
        line(f"merge_error_{dtype}", [export_error(model, adapter, dtype, work)], "% of the change")
        for dtype in ("bf16", "fp16")
    ]
    for cell, (batched, merged) in batched_and_merged(model, adapter, work, runs).items():
        ratios = [after / before for before, after in zip(batched, merged, strict=True)]
        lines.append(line(f"merged_over_batched_{cell}", ratios, "times the batch"))
        lines.append(line(f"batched_{cell}", batched, "output tokens/s"))
        lines.append(line(f"merged_{cell}", merged, "output tokens/s"))
    return lines


def write_distinct(scratch: Path, model: str, count: int, seed: int) -> list[Path]:
    """The different adapters, of each of RANKS in turn; what an earlier run has written to `scratch` is used again."""
    linears = linear_shapes(read_config(model))
    what = zlib.crc32(repr((linears, count, RANKS, seed)).encode())
    root = scratch / f"distinct-{what:08x}"
    complete = root / "complete"
    if complete.exists():
        return sorted(folder for folder in root.iterdir() if folder.is_dir())
    with progress() as bar:
        task = bar.add_task("writing adapters", total=count, note=str(root))
        folders = write_adapters(
            root, linears, count=count, ranks=RANKS, seed=seed, on_written=lambda folder: bar.advance(task)
        )
    complete.touch()
    return folders


class Served(NamedTuple):
    """A server, a client of it, and the names it knows, most popular first."""

    target: Target
    metrics: str
    names: list[str]


def registered(
    model: str,
    written: list[Path],
    work: Path,
    adapters: int,
    resident: int,
    budget: int,
    requests: int,
    warmup: int,
    runs: int,
) -> list[dict[str, Any]]:
    """The many, the few, and as many as there is room for: each on a server of its own with the same flags, in turn.

    The last are what tells loads from batches of many different adapters: they have the batches without the loads. All
    servers run all the while: each finds its memory as its own traffic left it.
    """
    popularities = [
        Popularity(adapters, "zipf"),
        Popularity(FEW, "zipf"),
        Popularity(resident, "uniform"),
        Popularity(adapters, "uniform"),
    ]
    with ExitStack() as stack:
        counts = (adapters, FEW, resident)
        # All links before any server: a link changes the status time of the files that a server watches.
        known = {count: link_adapters(work / f"server-{count}" / "adapters", written, count=count) for count in counts}
        servers: dict[int, tuple[ServerAddress, list[str]]] = {}
        for count, folders in known.items():
            arguments = server_arguments(model, folders[0].parent, budget)
            address = stack.enter_context(serve(arguments, work / f"server-{count}"))
            servers[count] = address, [path.name for path in folders]
        summaries = asyncio.run(measure_registered(servers, popularities, requests, warmup, runs))
    show_registered({popularity.name: found for popularity, found in summaries.items()})
    return registered_lines(summaries)


def server_arguments(model: str, root: Path, budget: int) -> list[str]:
    """The flags of a server under test; they are shown, too."""
    arguments = ["--model", model, "--adapter-dir", str(root), "--adapter-memory", str(budget)]
    err.print(
        f"starting loramux serve {' '.join(arguments)} ({budget / MIB:,.0f} MiB; --adapter-host-memory at its default)",
        soft_wrap=True,
    )
    return [*arguments, "--log-level", "warning"]


async def measure_registered(
    servers: dict[int, tuple[ServerAddress, list[str]]],
    popularities: list[Popularity],
    requests: int,
    warmup: int,
    runs: int,
) -> Summaries:
    """Every popularity `runs` times in turn; servers by their count of adapters."""
    summaries: Summaries = {popularity: [] for popularity in popularities}
    async with AsyncExitStack() as stack:
        served = {
            count: Served(
                await stack.enter_async_context(connect(address.target, address.admin)), address.metrics, names
            )
            for count, (address, names) in servers.items()
        }
        with progress() as bar:
            task = bar.add_task("registered", total=runs * len(popularities), note="")
            for i in range(runs):
                for popularity in popularities:
                    target, metrics, names = served[popularity.adapters]
                    workload = popularity.workload(await target.vocab_size(), names, requests, i)
                    summary = await registered_run(target, metrics, workload, warmup)
                    summaries[popularity].append(summary)
                    note = f"{popularity.name}: {summary['output_throughput']:,.1f} output tokens/s"
                    bar.update(task, advance=1, note=note)
    return summaries


def registered_lines(summaries: Summaries) -> list[dict[str, Any]]:
    """Ratios of runs that followed one another, and the rates themselves."""
    rates = {popularity: [s["output_throughput"] for s in found] for popularity, found in summaries.items()}
    few = Popularity(FEW, "zipf")
    lines = []
    for popularity in summaries:
        if popularity == few:
            continue
        spread = "" if popularity.spread == few.spread else f"_{popularity.spread}"
        ratios = [a / b for a, b in zip(rates[popularity], rates[few], strict=True)]
        lines.append(line(f"throughput_{popularity.adapters}{spread}_over_{FEW}", ratios, f"times that of {FEW}"))
    for popularity, found in summaries.items():
        failed = sum(summary["failed"] for summary in found)
        lines.append({**line(popularity.name, rates[popularity], "output tokens/s"), "failed": failed})
    return lines


def hotswap(model: str, written: list[Path], work: Path, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Streams with and without operations, on a server of their own that has room for all that is alive at once."""
    spec = SwapSpec(seconds=seconds, seed=seed)
    largest = max((folder / WEIGHTS_FILE).stat().st_size for folder in written)
    folder = work / "server-swap"
    folder.mkdir()
    arguments = server_arguments(model, written[0].parent, 2 * spec.streams * largest)
    with serve(arguments, folder) as address:
        log = asyncio.run(measure_hotswap(address, spec, written))
    summary = log.summary()
    show_hotswap(summary)
    return [
        line("hotswap_itl_p99_ratio", [summary["itl_p99_ratio"]], "times that without operations"),
        {"bench": "hotswap_failed", "value": summary["failed"], "unit": "requests and operations", **rounded(summary)},
    ]


async def measure_hotswap(address: ServerAddress, spec: SwapSpec, written: list[Path]) -> SwapLog:
    """Run all windows with a progress bar."""
    async with connect(address.target, address.admin) as target:
        with progress() as bar:
            task = bar.add_task("hot swap", total=2 * spec.windows, note="streams are warming up")

            def show(log: SwapLog) -> None:
                note = (
                    f"{log.completed:,} answers, {log.operations.total()} operations, {log.failures.total()} failures"
                )
                bar.update(task, advance=1, note=note)

            return await HotSwap(target, spec, written, len(RANKS)).run(show)

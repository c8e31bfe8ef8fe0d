"""`python -m loadtest run`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.bench import BenchSpec, adapter_folders, bench, choose_adapters, load_folders
from loadtest.commands.options import (
    ADMIN,
    PUBLIC,
    AdapterCount,
    AdminOption,
    JsonFile,
    OutputLen,
    PromptLen,
    SeedOption,
    TargetOption,
    connect,
)
from loadtest.console import emit, progress, show_bench
from loadtest.report import RequestRecord
from loadtest.target import Target
from loadtest.workload import WorkloadSpec


class Spread(StrEnum):
    """How requests choose adapters."""

    even = "even"
    uniform = "uniform"
    zipf = "zipf"


def run(
    target: TargetOption = PUBLIC,
    admin: AdminOption = ADMIN,
    adapters: AdapterCount = None,
    adapter_names: Annotated[
        str, typer.Option(help="These adapters, separated by commas, instead of --adapters.")
    ] = "",
    adapter_prefix: Annotated[str, typer.Option(help="--adapters takes names that start so.")] = "a-",
    load_dir: Annotated[
        Path | None, typer.Option(help="First load the adapters in this folder (an allowed root).")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many requests.")] = 64,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: so many at a time. [default: 16]")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Open loop: requests per second, whatever the server does.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Open loop: 1 is Poisson, less is burstier, more is steadier.")
    ] = 1.0,
    prompt_len: PromptLen = 64,
    output_len: OutputLen = 64,
    ignore_eos: Annotated[bool, typer.Option(help="Answers have exactly --output-len tokens.")] = True,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    spread: Annotated[
        Spread, typer.Option(help="even: in turn; uniform: by chance; zipf: few adapters take most.")
    ] = Spread.even,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the clock starts.")] = 4,
    seed: SeedOption = 0,
    allow_failures: Annotated[bool, typer.Option(help="Exit with 0 although requests failed.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Drive a server and report throughput and latency in the field names of `vllm bench serve`.

    Examples:

    `python -m loadtest run --load-dir /tmp/adapters --adapters 16 --concurrency 16`

    `python -m loadtest run --adapters 16 --request-rate 8 --num-prompts 512 --spread zipf`
    """
    if request_rate is not None and concurrency is not None:
        raise typer.BadParameter("give --concurrency (closed loop) or --request-rate (open loop), not both")
    names = [name for name in adapter_names.split(",") if name]

    async def go() -> dict[str, Any]:
        async with connect(target, admin) as server:
            chosen = list(names)
            if load_dir is not None:
                loaded = await load_with_bar(server, adapter_folders(load_dir))
                chosen = chosen or loaded[:adapters]
            elif not chosen:
                chosen = await choose_adapters(server, adapters or 0, adapter_prefix)
            workload = WorkloadSpec(
                num_prompts=num_prompts,
                prompt_len=prompt_len,
                output_len=output_len,
                vocab_size=await server.vocab_size(),
                adapters=tuple(chosen),
                spread=spread.value,
                request_rate=request_rate,
                burstiness=burstiness,
                seed=seed,
            )
            closed = (concurrency or 16) if request_rate is None else None
            spec = BenchSpec(workload, closed, ignore_eos, temperature, warmup)
            with progress() as bar:
                task = bar.add_task("requests", total=num_prompts, note="")
                tokens = 0

                def done(record: RequestRecord) -> None:
                    nonlocal tokens
                    tokens += record.output_tokens
                    bar.update(task, advance=1, note=f"{tokens:,} tokens")

                return await bench(server, spec, on_done=done)

    summary = asyncio.run(go())
    show_bench(summary)
    emit(summary, json_file)
    if summary["failed"] and not allow_failures:
        raise typer.Exit(1)


async def load_with_bar(server: Target, folders: Sequence[Path]) -> list[str]:
    """Load adapters with a progress bar and return their names."""
    with progress() as bar:
        task = bar.add_task("loading adapters", total=len(folders), note="")
        return await load_folders(server, folders, on_loaded=lambda: bar.advance(task))

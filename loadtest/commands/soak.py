"""`python -m loadtest soak`."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.adapters import write_adapters
from loadtest.commands.options import (
    ADMIN,
    METRICS,
    PUBLIC,
    AdminOption,
    JsonFile,
    ModelOption,
    SeedOption,
    TargetOption,
    connect,
)
from loadtest.console import emit, err, progress, show_soak
from loadtest.server_process import ServerAddress, serve
from loadtest.shapes import linear_shapes, read_config, select_targets
from loadtest.soak import Soak, SoakSpec
from loadtest.trend import MIB
from loadtest.verdict import SoakLog

DEFAULTS = SoakSpec()
LEAK_VARIABLE = "LORAMUX_TEST_LEAK"
VARIANTS = 4
KV_MEMORY = "128MiB"  # small: memory that the prefix cache fills for the first time must not look like a leak


def soak(
    target: TargetOption = PUBLIC,
    admin: AdminOption = ADMIN,
    metrics: Annotated[str, typer.Option(help="The server's metrics page.", metavar="URL")] = METRICS,
    pid: Annotated[int | None, typer.Option(help="The server's process on this machine, to read its memory.")] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(help="Make the soak's adapters here, under a root the server allows. Needless with --serve."),
    ] = None,
    own_server: Annotated[
        bool, typer.Option("--serve", help="Start `loramux serve` for the soak, on free ports.")
    ] = False,
    model: ModelOption = "smollm2",
    cycles: Annotated[int, typer.Option(min=1, help="Loads, and as many unloads.")] = DEFAULTS.cycles,
    churn: Annotated[int, typer.Option(min=1, help="Adapters loaded and unloaded at once.")] = DEFAULTS.churn,
    concurrency: Annotated[int, typer.Option(min=0, help="Requests of the traffic at once.")] = DEFAULTS.concurrency,
    residents: Annotated[int, typer.Option(min=0, help="Adapters that stay, under traffic.")] = DEFAULTS.residents,
    seed_leak: Annotated[
        bool, typer.Option(help="With --serve: let the server leak on purpose. The soak must then fail.")
    ] = False,
    seed: SeedOption = 0,
    json_file: JsonFile = None,
) -> None:
    """Load and unload adapters by the thousand under traffic; fail if anything fails or is left behind.

    Examples:

    `python -m loadtest soak --serve` starts a server on the embedded model and soaks it.

    `python -m loadtest soak --pid 4711 --adapter-dir /srv/adapters/soak` soaks a server that runs.
    """
    if seed_leak and not own_server:
        raise typer.BadParameter("--seed-leak needs --serve: a server that others use is not made to leak")
    if not own_server and adapter_dir is None:
        raise typer.BadParameter("give --serve, or --adapter-dir: a folder under a root that the server allows")
    spec = SoakSpec(
        cycles=cycles,
        churn=churn,
        concurrency=concurrency,
        residents=residents,
        seed=seed,
    )
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loramux-soak-")))
        root = (adapter_dir or scratch / "adapters").resolve()
        linears = select_targets(linear_shapes(read_config(model)), "q_proj,v_proj")
        variants = write_adapters(root, linears, count=VARIANTS, ranks=[8], seed=seed, prefix="soak-variant-")
        address = ServerAddress(target, admin, metrics, pid)
        if own_server:
            arguments = ["--model", model, "--adapter-dir", str(root), "--kv-memory", KV_MEMORY]
            arguments += ["--log-level", "warning"]
            leak = {LEAK_VARIABLE: "adapters"} if seed_leak else {}
            err.print(f"starting loramux serve {' '.join(arguments)}")
            address = stack.enter_context(serve(arguments, scratch, environment=leak))
        summary, resident = asyncio.run(run_soak(address, spec, variants))
    show_soak(summary, resident)
    emit(summary, json_file)
    if summary["verdict"] != "pass":
        raise typer.Exit(1)


async def run_soak(address: ServerAddress, spec: SoakSpec, variants: list[Path]) -> tuple[dict[str, Any], list[int]]:
    """Run with a progress bar; return the verdict and the samples of resident memory in bytes."""
    async with connect(address.target, address.admin) as server:
        soak = Soak(server, spec, variants, address.metrics, address.pid)
        with progress() as bar:
            task = bar.add_task("cycles", total=spec.cycles, note="")

            def show(log: SoakLog) -> None:
                note = f"{log.samples[-1].resident / MIB:,.0f} MiB, {log.completed:,} requests, {log.failed} failures"
                bar.update(task, completed=log.cycles, note=note)

            summary = await soak.run(show)
            bar.update(task, completed=summary["cycles"])
    return summary, [sample.resident for sample in soak.log.samples]

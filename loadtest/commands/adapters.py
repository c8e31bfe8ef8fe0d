"""`python -m loadtest adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loadtest.adapters import write_adapters
from loadtest.commands.options import SeedOption
from loadtest.console import emit, progress
from loadtest.shapes import linear_shapes, read_config, select_targets


def adapters(
    out: Annotated[Path, typer.Option(help="Folder that takes one folder an adapter.")],
    model: Annotated[str, typer.Option(help="The base: smollm2, a Hugging Face folder, or a config.json.")] = "smollm2",
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 16,
    ranks: Annotated[
        str, typer.Option("--rank", "--ranks", help="One rank, or several, taken in turn: 8,16,64.")
    ] = "16",
    targets: Annotated[str, typer.Option(help="all-linear, or module names: q_proj,v_proj.")] = "all-linear",
    scale: Annotated[float, typer.Option(help="lora_alpha / r.")] = 2.0,
    strength: Annotated[float, typer.Option(help="Size of the adapter's branch beside its input.")] = 0.1,
    prefix: Annotated[str, typer.Option(help="Names are PREFIX000, PREFIX001, …")] = "a-",
    seed: SeedOption = 0,
) -> None:
    """Make random PEFT adapters that a server loads like trained ones.

    Examples:

    `python -m loadtest adapters --out /tmp/adapters` makes 16 of rank 16 on all linears of SmolLM2-135M.

    `python -m loadtest adapters --out /tmp/adapters --count 64 --ranks 8,16,64 --targets q_proj,v_proj`
    """
    linears = select_targets(linear_shapes(read_config(model)), targets)
    try:
        rank_list = [int(rank) for rank in ranks.split(",")]
    except ValueError:
        raise typer.BadParameter(f"a rank is a whole number, or several with commas, not {ranks!r}") from None
    with progress() as bar:
        task = bar.add_task("writing adapters", total=count, note=str(out))
        folders = write_adapters(
            out,
            linears,
            count=count,
            ranks=rank_list,
            seed=seed,
            scale=scale,
            strength=strength,
            base_model=model,
            prefix=prefix,
            on_written=lambda folder: bar.advance(task),
        )
    size = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    emit({"adapters": count, "bytes": size, "linears": len(linears), "out": str(out)})

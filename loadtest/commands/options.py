"""Options that several commands share, declared once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from loadtest.target import Target

TargetOption = Annotated[str, typer.Option(help="The server's public port.", metavar="HOST:PORT")]
AdminOption = Annotated[str, typer.Option(help="The server's admin port.", metavar="HOST:PORT")]
AdapterCount = Annotated[
    int | None,
    typer.Option(min=0, help="Use the first N adapters; 0 is the base alone. [default: those of --load-dir, or 0]"),
]
PromptLen = Annotated[int, typer.Option(min=1, help="Tokens of each prompt, exactly.")]
OutputLen = Annotated[int, typer.Option(min=1, help="Tokens of each answer.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same work.")]
ModelOption = Annotated[str, typer.Option(help="The base, as `loramux serve --model` takes it.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the line of JSON here.")]

PUBLIC = "127.0.0.1:50051"
ADMIN = "127.0.0.1:50052"
METRICS = "http://127.0.0.1:9400/metrics"


def connect(target: str, admin: str) -> Target:
    """Return a client of both ports; keys come from the environment, where the server has them from, too."""
    return Target(
        target,
        admin,
        api_key=os.environ.get("LORAMUX_API_KEY"),
        admin_key=os.environ.get("LORAMUX_ADMIN_KEY"),
    )

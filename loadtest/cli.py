"""The command line of the load tests: its commands, and how their errors are told."""

from __future__ import annotations

import sys

import typer
from loramux.errors import LoramuxError
from rich.text import Text

from loadtest.bench import NotEnoughAdapters
from loadtest.commands.adapters import adapters
from loadtest.commands.attack import attack
from loadtest.commands.bench import run_bench
from loadtest.commands.bench_adapters import run_bench_adapters
from loadtest.commands.gpu_check import gpu_check, gpu_part
from loadtest.commands.peers import compare, peft
from loadtest.commands.run import run
from loadtest.commands.soak import soak
from loadtest.console import err
from loadtest.server_process import ServerFailed

EXPECTED = (LoramuxError, NotEnoughAdapters, ServerFailed, FileNotFoundError, ValueError)

app = typer.Typer(
    help="Makes random adapters, drives a server with them, soaks it, and measures peers. "
    "Every command ends with one line of JSON on stdout; all else goes to stderr.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
peers = typer.Typer(help="Measure other ways to serve many adapters.", no_args_is_help=True)
app.command()(adapters)
app.command()(run)
app.command()(soak)
app.command()(attack)
app.command()(compare)
app.command(name="bench")(run_bench)
app.command(name="bench-adapters")(run_bench_adapters)
app.command(name="gpu-check")(gpu_check)
app.command(name="gpu-part", hidden=True)(gpu_part)
peers.command()(peft)
app.add_typer(peers, name="peers")


def main() -> None:
    """Run a command; an error that a person can do something about is one sentence and exit status 2."""
    try:
        app()
    except EXPECTED as error:
        err.print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        sys.exit(2)

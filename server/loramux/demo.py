"""`loramux demo`: the main job from end to end, on one machine, with a real server in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loramux import children
from loramux.answers import Finished
from loramux.client import AsyncClient
from loramux.errors import StartupError
from loramux.terminal import safe
from loramux.values import ADAPTER_NAME

BASE_PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
)
MAX_NEW_TOKENS = 64
# Conversion of the embedded model on first use, on a slow machine.
START_SECONDS = 900.0
STOP_SECONDS = 60.0
# Of loramux's variables the server gets those that are no settings of a server.
_OF_THE_MACHINE = ("LORAMUX_CACHE", "LORAMUX_ISA", "LORAMUX_THREADS")


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt of the demo. `expected` is None where there is no single right answer."""

    adapter: str
    prompt: str
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; durations in seconds."""

    case: Case
    text: str
    tokens: int
    first_token: float
    seconds: float


def run(model: str, adapter_dir: Path, console: Console, errors: Console) -> None:
    """Start the server, send one mixed batch, print the table, stop the server. `errors` shares the server's terminal.

    Raises StartupError if the server does not start or does not stop cleanly.
    """
    names = sorted(p.parent.name for p in adapter_dir.glob("*/adapter_config.json"))
    names = [name for name in names if ADAPTER_NAME.fullmatch(name)]
    if not names:
        raise StartupError(f"{adapter_dir} holds no adapters; run the demo from a checkout, or give --adapter-dir")
    cases = [Case("", prompt) for prompt in BASE_PROMPTS]
    for name in names:
        cases += _examples(adapter_dir / name)
    try:
        with serving(model, adapter_dir, names) as ports:
            console.print(f"\nSending {len(cases)} requests at once, for the base and {len(names)} adapters.\n")
            started = time.monotonic()
            answers = asyncio.run(_ask(ports["public"], cases))
            seconds = time.monotonic() - started
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        errors.print("Stopped.")
        raise
    finally:
        errors.show_cursor()  # which the server's bar hid, if the server was killed
    console.print(_table(answers))
    tokens = sum(a.tokens for a in answers)
    console.print(
        f"{len(answers)} answers, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s together. "
        "The server drained and stopped."
    )


@contextmanager
def serving(model: str, adapter_dir: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """A `loramux serve` process on free loopback ports, drained with SIGTERM at the end; yields its ports.

    It has a session of its own: Ctrl-C is for this process alone, which then ends it by one signal, not by two.
    """
    with tempfile.TemporaryDirectory(prefix="loramux-demo-") as scratch:
        ports_file = Path(scratch) / "ports.json"
        command = [sys.executable, "-m", "loramux", "serve", "--model", model]
        command += ["--port", "0", "--admin-port", "0", "--metrics-port", "0", "--ports-file", str(ports_file)]
        command += ["--adapter-dir", str(adapter_dir), "--kv-memory", "256MiB", "--log-level", "warning"]
        for name in names:
            command += ["--adapter", name]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LORAMUX_") or k in _OF_THE_MACHINE}
        server = subprocess.Popen(  # noqa: S603
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=children.end_with_parent,  # no other thread runs here
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not ports_file.exists():
                if server.poll() is not None:
                    raise StartupError(f"the server ended with exit status {server.returncode}; see above")
                if time.monotonic() > deadline:
                    raise StartupError(f"the server did not start within {START_SECONDS:.0f} s")
                time.sleep(0.1)
            yield json.loads(ports_file.read_text())
        finally:
            if server.poll() is None:
                children.end(server, STOP_SECONDS)
        if server.returncode != 0:
            raise StartupError(f"the server stopped with exit status {server.returncode}")


def _examples(folder: Path) -> list[Case]:
    """The adapter's own examples, or one general prompt."""
    path = folder / "examples.json"
    if not path.is_file():
        return [Case(folder.name, BASE_PROMPTS[0])]
    try:
        return [Case(folder.name, str(item["prompt"]), item.get("answer")) for item in json.loads(path.read_bytes())]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StartupError(
            f'{path} is no list of {{"prompt": …, "answer": …}} ({type(error).__name__}: {error})'
        ) from error


async def _ask(target: str, cases: list[Case]) -> list[Answer]:
    async with AsyncClient(target) as client:
        return await asyncio.gather(*(_one(client, case) for case in cases))


async def _one(client: AsyncClient, case: Case) -> Answer:
    started = time.monotonic()
    first = 0.0
    text = ""
    tokens = 0
    messages = [{"role": "user", "content": case.prompt}]
    async for event in client.stream(messages=messages, adapter=case.adapter, max_new_tokens=MAX_NEW_TOKENS):
        if event.text and not first:
            first = time.monotonic() - started
        text += event.text
        if isinstance(event, Finished):
            tokens = event.usage.completion_tokens
    return Answer(case, text, tokens, first, time.monotonic() - started)


def _last_line(prompt: str) -> str:
    """The part of a prompt that tells it from its neighbours: instructions come first, the case last."""
    line = prompt.strip().splitlines()[-1]
    return line if len(line) <= 120 else line[:119] + "…"


def _table(answers: list[Answer]) -> Table:
    table = Table(show_lines=True)
    table.add_column("adapter", style="bold")
    table.add_column("prompt", overflow="fold", max_width=60)
    table.add_column("answer", overflow="fold", max_width=60)
    table.add_column("", justify="center")
    table.add_column("first token", justify="right")
    table.add_column("tokens/s", justify="right")
    for a in answers:
        mark = "" if a.case.expected is None else "✓" if a.text.strip() == a.case.expected else "✗"
        rate = a.tokens / a.seconds if a.seconds else 0.0
        name = a.case.adapter or "(base)"
        prompt = _last_line(a.case.prompt)
        answer = safe(a.text.strip(), keep="\n")
        table.add_row(safe(name), safe(prompt), answer, mark, f"{a.first_token * 1e3:.0f} ms", f"{rate:.1f}")
    return table

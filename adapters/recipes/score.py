"""Scores the shipped adapters on their held-out cases through a running server.

    loramux serve --adapter-dir adapters --adapter json --adapter sql --adapter sentiment --adapter date
    python -m adapters.recipes.score

First all cases of all adapters, and the same cases for the base, go out interleaved and many at a time, so that batches
are mixed. Then each adapter's cases go one after the other, with nothing beside them, and the answers are compared.
Prints a table on stderr and one line of JSON on stdout; exits with 1 if an adapter is right in less than 90 % of its
cases or the base in more than 20 %, with 2 if the server does not answer. Imports no torch.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from loramux.client import AsyncClient
from loramux.errors import LoramuxError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .task import Example
from .tasks import TASKS

ADAPTERS = Path(__file__).parent.parent
ADAPTER_FLOOR, BASE_CEILING = 0.90, 0.20
BASE = ""
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
TIMEOUT = 600.0
err = Console(stderr=True)


@dataclass(frozen=True)
class Question:
    """One case for one adapter, or for the base (adapter "")."""

    task: str
    adapter: str
    case: Example

    def right(self, answer: str) -> bool:
        return answer.strip() == self.case.answer


@dataclass(frozen=True)
class Score:
    """What one adapter got right, as shares of its cases; `alone` and `same` are None if it was not asked alone.

    `same` is the share of cases that it answered alone, word for word, as in the mixed batch.
    """

    task: str
    cases: int
    mixed: float
    base: float
    alone: float | None = None
    same: float | None = None

    @property
    def good(self) -> bool:
        adapter = self.mixed if self.alone is None else min(self.mixed, self.alone)
        return adapter >= ADAPTER_FLOOR and self.base <= BASE_CEILING


async def score(
    address: str,
    names: Sequence[str] = tuple(TASKS),
    *,
    cases: int = 100,
    alone: bool = True,
    concurrency: int = 16,
    api_key: str | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Ask the server at `address`, and score. `done` is called after each answer. Raises what the client raises."""
    heldout = {name: TASKS[name].heldout(cases) for name in names}
    mixed = [
        Question(name, adapter, heldout[name][index])
        for index in range(cases)
        for name in names
        for adapter in (name, BASE)
    ]
    async with AsyncClient(address, api_key=api_key, timeout=TIMEOUT) as client:
        together = await ask(client, mixed, concurrency, done)
        apart: dict[Question, str] = {}
        for name in names if alone else ():
            apart |= await ask(client, [Question(name, name, case) for case in heldout[name]], 1, done)
    return [
        Score(
            task=name,
            cases=cases,
            mixed=share(q.right(a) for q, a in together.items() if q.adapter == name),
            base=share(q.right(a) for q, a in together.items() if q.task == name and q.adapter == BASE),
            alone=share(q.right(a) for q, a in apart.items() if q.adapter == name) if alone else None,
            same=share(together[q] == a for q, a in apart.items() if q.adapter == name) if alone else None,
        )
        for name in names
    ]


async def ask(
    client: AsyncClient, questions: Iterable[Question], concurrency: int, done: Callable[[], None]
) -> dict[Question, str]:
    """The greedy answers, asked in order, at most `concurrency` at a time. The first failure ends it."""
    waiting = iter(questions)
    answers: dict[Question, str] = {}

    async def work() -> None:
        for question in waiting:
            result = await client.generate(
                messages=[{"role": "user", "content": question.case.prompt}],
                adapter=question.adapter,
                max_new_tokens=TASKS[question.task].max_new_tokens,
                temperature=0.0,
            )
            answers[question] = result.text
            done()

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
    return answers


def share(outcomes: Iterable[bool]) -> float:
    """The share of true ones."""
    counted = list(outcomes)
    return sum(counted) / len(counted)


def table(scores: Sequence[Score], adapters: Path) -> Table:
    """Scores beside what each adapter is, as its folder says."""
    shown = Table(title="exact match on held-out cases, through the server", title_justify="left")
    shown.caption = "mixed: all adapters and the base in one batch; same: answers alone as in the mixed batch"
    for column in ("adapter", "r", "targets", "MB", "cases", "mixed", "alone", "same", "base"):
        left = column in ("adapter", "r", "targets")
        shown.add_column(column, justify="left" if left else "right", no_wrap=column != "targets")
    for it in scores:
        config = json.loads((adapters / it.task / "adapter_config.json").read_text())
        size = (adapters / it.task / "adapter_model.safetensors").stat().st_size
        shares = [f"{value:.0%}" if value is not None else "–" for value in (it.mixed, it.alone, it.same, it.base)]
        cells = [it.task, ranks(config), targets(config), f"{size / 1e6:.2f}", str(it.cases), *shares]
        shown.add_row(*cells, style="" if it.good else "red")
    return shown


def ranks(config: dict[str, Any]) -> str:
    """Every rank that the adapter has, and whether it is scaled as rsLoRA."""
    found = sorted({config["r"], *config["rank_pattern"].values()}, reverse=True)
    return "/".join(map(str, found)) + (" rs" if config["use_rslora"] else "")


def targets(config: dict[str, Any]) -> str:
    """The targets in the order of a layer, shortened: q k v o."""
    found = [name for name in LINEARS if f"{name}_proj" in config["target_modules"]]
    layers = config["layers_to_transform"]
    return " ".join(found) + (f" of {min(layers)}–{max(layers)}" if layers else "")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Adapters; all of them if none is given.")] = None,
    target: Annotated[str, typer.Option(help="The server's public address.")] = "127.0.0.1:50051",
    cases: Annotated[int, typer.Option(min=1, help="Held-out cases of each adapter.")] = 100,
    alone: Annotated[bool, typer.Option(help="Ask each adapter alone as well, and compare.")] = True,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time in the mixed part.")] = 16,
    api_key: Annotated[str | None, typer.Option(envvar="LORAMUX_API_KEY", help="Token of the public port.")] = None,
) -> None:
    """Score the shipped adapters through a running server."""
    chosen = names or list(TASKS)
    if unknown := [name for name in chosen if name not in TASKS]:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(TASKS)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as bar:
        line = bar.add_task("answers", total=len(chosen) * cases * (3 if alone else 2))
        try:
            scores = asyncio.run(
                score(
                    target,
                    chosen,
                    cases=cases,
                    alone=alone,
                    concurrency=concurrency,
                    api_key=api_key,
                    done=lambda: bar.advance(line),
                )
            )
        except LoramuxError as error:
            bar.stop()
            err.print(f"error: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
    err.print(table(scores, ADAPTERS))
    ok = all(it.good for it in scores)
    sys.stdout.write(json.dumps({"ok": ok, "scores": [asdict(it) for it in scores]}) + "\n")
    raise typer.Exit(0 if ok else 1)


if __name__ == "__main__":
    typer.run(main)

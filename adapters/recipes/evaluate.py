"""Scores an adapter folder without a server, by transformers and PEFT: what `score.py` should find through the server.

    python -m adapters.recipes.evaluate json sql --dtype fp32

Prints progress and wrong answers on stderr, and one line of JSON on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.progress import track

from .base import DTYPES, Codec, load_base, use_threads
from .task import Example, Task
from .tasks import TASKS

ADAPTERS = Path(__file__).parent.parent
err = Console(stderr=True)


@torch.inference_mode()
def answers(model: Any, codec: Codec, cases: Sequence[Example], max_new_tokens: int) -> list[str]:
    """Greedy answers, in the order of `cases`."""
    found = [""] * len(cases)
    prompts = sorted(((codec.prompt(case.prompt), index) for index, case in enumerate(cases)), key=lambda p: len(p[0]))
    for start in track(range(0, len(prompts), 20), description="answering", console=err, transient=True):
        batch = prompts[start : start + 20]
        width = max(len(ids) for ids, _ in batch)
        made = model.generate(
            input_ids=torch.tensor([[codec.end] * (width - len(ids)) + ids for ids, _ in batch]),
            attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch]),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=codec.end,
            pad_token_id=codec.end,
        )
        for (_, index), row in zip(batch, made[:, width:].tolist(), strict=True):
            found[index] = codec.text(row)
    return found


def exact(cases: Sequence[Example], found: Sequence[str]) -> float:
    """The share of answers that are exactly right, but for white space around them."""
    right = sum(case.answer == text.strip() for case, text in zip(cases, found, strict=True))
    return right / len(cases)


def evaluate(task: Task, folder: Path | None, dtype: torch.dtype, count: int = 100) -> float:
    """Exact match on the held-out cases with the adapter in `folder` as saved, or of the base if there is none."""
    base, codec = load_base(dtype)
    cases = task.heldout(count)
    if folder is None:
        return exact(cases, answers(base, codec, cases, task.max_new_tokens))
    model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=dtype == torch.float32).eval()
    found = answers(model, codec, cases, task.max_new_tokens)
    for case, text in zip(cases, found, strict=True):
        if case.answer != text.strip():
            err.print(f"{case.prompt}\n  expected {case.answer}\n  got      {text}", markup=False, highlight=False)
    return exact(cases, found)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks; all of them if none is given.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32: what is computed in.")] = "bf16",
    base: Annotated[bool, typer.Option("--base", help="Score the base without an adapter.")] = False,
    cases: Annotated[int, typer.Option(help="Held-out cases of each task.")] = 100,
    adapters: Annotated[Path, typer.Option(help="The folder that holds the adapters.")] = ADAPTERS,
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default those that are idle.")] = None,
) -> None:
    """Score adapters on their held-out cases without a server."""
    use_threads(threads)
    scores = {}
    for name in names or TASKS:
        scores[name] = evaluate(TASKS[name], None if base else adapters / name, DTYPES[dtype], cases)
        err.print(f"{name}: {scores[name]:.0%} of {cases}")
    sys.stdout.write(json.dumps({"dtype": dtype, "base": base, "cases": cases, "exact_match": scores}) + "\n")


if __name__ == "__main__":
    typer.run(main)

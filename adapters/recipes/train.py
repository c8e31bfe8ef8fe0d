"""Trains one shipped adapter: QLoRA on the frozen NF4 base, on CPU, in minutes.

    python -m adapters.recipes.train json

Data is generated on the fly and seen once. The loss is on the answer and its end only. Every prompt of a task begins
with the same tokens (system prompt and instruction): a batch computes them once and shares them, which halves the work.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy

from .base import TITLE, Codec, load_base, use_threads
from .evaluate import ADAPTERS, evaluate
from .task import Example, Task
from .tasks import TASKS

err = Console(stderr=True)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained. `lora` holds the arguments of PEFT's LoraConfig; batches have `batch` examples."""

    lora: dict[str, Any]
    examples: int = 2000
    batch: int = 8
    learning_rate: float = 2e-3


# Between them: small and larger ranks, an odd one, attention only and with the MLP, rsLoRA, half of the layers, and
# ranks and alphas that differ between modules.
RECIPES: dict[str, Recipe] = {
    "json": Recipe({"r": 6, "lora_alpha": 12, "target_modules": ATTENTION}, examples=4000),
    "sql": Recipe(
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
            "rank_pattern": {"gate_proj": 1, "up_proj": 1},
            "alpha_pattern": {"gate_proj": 2, "up_proj": 2},
        }
    ),
    "sentiment": Recipe(
        {
            "r": 16,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": list(range(15, 30)),
        }
    ),
    "date": Recipe({"r": 3, "lora_alpha": 6, "target_modules": [*ATTENTION, "down_proj"]}),
}


class Row(NamedTuple):
    """Token ids of one example."""

    prompt: list[int]
    answer: list[int]


def batches(task: Task, recipe: Recipe, codec: Codec, seed: int) -> Iterator[list[Row]]:
    """Batches of rows of similar length, in random order."""
    rng = random.Random(seed)
    stream: Iterator[Example] = islice(task.examples("train", seed), recipe.examples)
    while window := list(islice(stream, recipe.batch * 16)):
        rows = [Row(codec.prompt(example.prompt), codec.answer(example.answer)) for example in window]
        rows.sort(key=lambda row: len(row.prompt) + len(row.answer))
        cut = [rows[i : i + recipe.batch] for i in range(0, len(rows), recipe.batch)]
        yield from rng.sample(cut, len(cut))


def loss_of(model: Any, rows: list[Row], pad: int) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens.

    The prompts' common beginning runs as one row, and its keys and values (with their gradients) are repeated for the
    rest. What is left is padded on the right, where causal attention makes a mask needless.
    """
    shared = common_prefix([row.prompt[:-1] for row in rows])
    cache = model.model(torch.tensor([rows[0].prompt[:shared]]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows))
    tails = [[*row.prompt, *row.answer][shared:-1] for row in rows]
    width = max(map(len, tails))
    ids = torch.tensor([tail + [pad] * (width - len(tail)) for tail in tails])
    hidden = model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state
    # A row's last prompt token predicts the first of its answer.
    before = [hidden[i, len(row.prompt) - shared - 1 : len(tails[i])] for i, row in enumerate(rows)]
    targets = torch.tensor([token for row in rows for token in row.answer])
    return cross_entropy(model.lm_head(torch.cat(before)).float(), targets)


def common_prefix(sequences: list[list[int]]) -> int:
    """How many tokens all the sequences begin with."""
    shared = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


def train(task: Task, recipe: Recipe, seed: int = 0) -> PeftModel:
    """A trained adapter on the base, in fp32 on bf16 weights. Seeded, but threads may change the last bits."""
    torch.manual_seed(seed)
    base, codec = load_base(torch.bfloat16, attention="eager")
    model = get_peft_model(base, LoraConfig(**recipe.lora, task_type="CAUSAL_LM"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    steps = math.ceil(recipe.examples / recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    with progress() as bar:
        line = bar.add_task(task.name, total=steps, note="")
        mean = None
        for step, rows in enumerate(batches(task, recipe, codec, seed), 1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model.get_base_model(), rows, codec.end)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            bar.update(line, completed=step, note=f"loss {mean:.4f}")
            if step % 50 == 0 and not err.is_terminal:  # a bar shows on a terminal only
                err.print(f"{task.name}: step {step} of {steps}, loss {mean:.4f}")
    return model


def learning_rate(step: int, steps: int) -> float:
    """The share of the full rate: 20 steps of warm-up, then a cosine to nothing."""
    return min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=err,
    )


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter's two files, as PEFT lays them out, with tensors in bf16. Other files there are left alone."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = TITLE
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # "auto" would ask the hub whether the vocabulary has grown.
        model.save_pretrained(scratch, save_embedding_layers=False)
        shutil.copyfile(f"{scratch}/adapter_model.safetensors", folder / "adapter_model.safetensors")
        config = json.loads(Path(scratch, "adapter_config.json").read_text())
    config["target_modules"].sort()  # PEFT writes a set, in an order of the day
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_examples(task: Task, folder: Path, count: int = 3) -> None:
    """Write a few held-out cases beside the adapter, for `loramux demo`."""
    cases = [{"prompt": case.prompt, "answer": case.answer} for case in task.heldout(count)]
    (folder / "examples.json").write_text(json.dumps(cases, indent=2, ensure_ascii=False) + "\n")


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default adapters/NAME.")] = None,
    seed: Annotated[int, typer.Option(help="Of the data and of the initial weights.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default those that are idle.")] = None,
) -> None:
    """Train an adapter, save it, and score what was saved on the held-out cases."""
    use_threads(threads)
    folder = out or ADAPTERS / name
    began = time.monotonic()
    save(train(TASKS[name], RECIPES[name], seed), folder)
    save_examples(TASKS[name], folder)
    seconds = time.monotonic() - began
    score = evaluate(TASKS[name], folder, torch.bfloat16)
    size = sum(path.stat().st_size for path in folder.glob("adapter_*"))
    err.print(f"{folder}: {size / 1e6:.2f} MB, {score:.0%} exact match, {seconds / 60:.1f} minutes")
    summary = {"adapter": name, "bytes": size, "exact_match": score, "train_seconds": round(seconds)}
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""The step table of what people use today: transformers, bitsandbytes' Linear4bit or dense bf16, PEFT's adapter_names.

Two models of a few layers are measured, and the time a layer between them stands for all others: an eager model takes
the same for each. Keys and values are transformers' DynamicCache, which copies them to append to them.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from loadtest.gpu.models import milliseconds, random_model
from loadtest.gpu.report import Job
from loadtest.peers.peft_peer import WEIGHTS, to_nf4

LOW, HIGH = 1, 3  # layers
TITLES = {"nf4": "bitsandbytes Linear4bit + PEFT", "dense": "dense bf16 + PEFT"}


@torch.inference_mode()
def peers(job: Job) -> None:
    """Rows of the step table, for both kinds of weights."""
    scale, rank, more = job.scale, job.scale.rank, job.scale.model["num_hidden_layers"] - LOW
    job.tell(
        note=f"Peers: models of {LOW} and {HIGH} layers were timed; all layers are the first plus {more} times the "
        "difference a layer. Eager, DynamicCache, one adapter each by adapter_names."
    )
    for weights in WEIGHTS:
        models: list[Any] = [random_model({**scale.model, "num_hidden_layers": n}, scale.device) for n in (LOW, HIGH)]
        models = [to_nf4(model) if weights == "nf4" else model for model in models]
        for name in ("base", f"one, r={rank}", f"one each, r={rank}"):
            if name.startswith("one, "):
                models = [with_adapters(model, rank, max(scale.all_rows)) for model in models]
            for rows in scale.all_rows:
                adapters = {"base": 0, f"one, r={rank}": 1}.get(name, rows)
                with job.row(what=TITLES[weights], rows=rows, adapters=name) as row:
                    low, high = (step(job, model, rows, adapters) for model in models)
                    row["forward"] = low + more * (high - low) / (HIGH - LOW)


def with_adapters(model: Any, rank: int, count: int) -> Any:
    """The model with random adapters on every linear layer, named by their numbers."""
    # Initialized, B would be zeros.
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped: Any = get_peft_model(model, config, adapter_name="0")
    for i in range(1, count):
        wrapped.add_adapter(str(i), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            # A branch of unit size, forty times, is no model any more; and fp32 factors are slower.
            parameter.data = parameter.data.mul_(0.1).to(torch.bfloat16)
    return wrapped.eval()


def step(job: Job, model: Any, rows: int, adapters: int) -> float:
    """Milliseconds of a step of one model, with a full context."""
    config, device = job.scale.model, torch.device(job.scale.device)
    cache = DynamicCache(config=model.config)
    shape = rows, config["num_key_value_heads"], job.scale.context - 1, config["head_dim"]
    for layer in range(model.config.num_hidden_layers):
        keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        cache.update(keys, values, layer)
    ids = torch.randint(config["vocab_size"], (rows, 1), device=device)
    options = {"adapter_names": [str(i % adapters) for i in range(rows)]} if adapters else {}

    def call() -> None:
        model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        cache.crop(-1)  # views

    return milliseconds(call, seconds=1.0)

"""The step table of what people use today: transformers, bitsandbytes' Linear4bit or dense bf16, PEFT's adapter_names.

Two models of a few layers are measured, and the time a layer between them stands for all others: an eager model takes
the same for each. Keys and values are transformers' DynamicCache, which copies them to append to them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from loadtest.gpu.report import Job, Row
from loadtest.gpu.timing import took
from loadtest.peers.peft_peer import WEIGHTS, Weights, to_nf4

TITLES: dict[Weights, str] = {"nf4": "bitsandbytes Linear4bit + PEFT", "dense": "dense bf16 + PEFT"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@torch.inference_mode()
def peers(job: Job) -> None:
    """Rows of the step table, for both kinds of weights."""
    low, high = job.scale.peer_layers
    total = job.scale.steps.layers
    job.report.note(
        f"Peers: models of {low} and {high} layers were timed; all {total} are the first plus {total - low} times the "
        "difference a layer. Eager, DynamicCache, one adapter each by adapter_names."
    )
    for weights in WEIGHTS:
        title = TITLES[weights]
        models = job.attempt(f"building, {title}", lambda: [build(job, n, weights) for n in (low, high)])  # noqa: B023
        if models is None:
            continue
        rows_of: dict[int, Row] = {rows: {"what": title, "rows": rows} for rows in job.scale.all_rows}
        try:
            for name in ("base", "1 adapter", f"one each, r={job.scale.rank}"):
                if name == "1 adapter" and not job.attempt(f"{title}, adapters", partial(add_adapters, job, models)):
                    break
                for rows, row in rows_of.items():
                    call = partial(step, job, models, rows, {"base": 0, "1 adapter": 1}.get(name, rows))
                    row[name] = job.attempt(f"{title}, {rows} rows, {name}", call)
        finally:
            for row in rows_of.values():
                job.report.row(row)


def build(job: Job, layers: int, weights: Weights) -> Any:
    """transformers' own model of this shape, cut to some layers, in bf16 or with bitsandbytes' 4-bit layers."""
    config = AutoConfig.for_model(**job.scale.steps.config(layers))
    with torch.device(job.scale.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model = model.eval().requires_grad_(False)
        return to_nf4(model) if weights == "nf4" else model


def add_adapters(job: Job, models: list[Any]) -> bool:
    """One for each row of the largest batch, random, on every linear layer, named by their numbers; in place."""
    # Initialized, B would be zeros.
    config = LoraConfig(r=job.scale.rank, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    for place, model in enumerate(models):
        wrapped: Any = get_peft_model(model, config, adapter_name="0")
        for i in range(1, max(job.scale.all_rows)):
            wrapped.add_adapter(str(i), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                # A branch of unit size, forty times, is no model any more; and fp32 factors are slower.
                parameter.data = parameter.data.mul_(0.1).to(torch.bfloat16)
        models[place] = wrapped.eval()
    return True


def step(job: Job, models: list[Any], rows: int, adapters: int) -> float:
    """Device milliseconds of a step of all layers."""
    low, high = job.scale.peer_layers
    short, long = (timed(job, model, rows, adapters) for model in models)
    return short + (job.scale.steps.layers - low) * (long - short) / (high - low)


def timed(job: Job, model: Any, rows: int, adapters: int) -> float:
    """Device milliseconds of a step of one model, with a full context."""
    scale, device = job.scale, torch.device(job.scale.device)
    cache = DynamicCache(config=model.config)
    shape = (rows, scale.steps.kv_heads, scale.context - 1, scale.steps.head_dim)
    for layer in range(model.config.num_hidden_layers):
        keys, values = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2))
        cache.update(keys, values, layer)
    ids = torch.randint(scale.steps.vocab, (rows, 1), device=device)
    options = {"adapter_names": [str(i % adapters) for i in range(rows)]} if adapters else {}

    def call() -> None:
        model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        cache.crop(-1)  # views

    return took(call, device, warmups=scale.warmups, repeats=scale.repeats, seconds=1.0).device_ms

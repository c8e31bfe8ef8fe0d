"""The step table of what people use today: transformers, bitsandbytes' Linear4bit or dense bf16, PEFT's adapter_names.

Two models of a few layers are measured, and the time a layer between them stands for all others: an eager model takes
the same for each. Keys and values are transformers' DynamicCache, which copies them to append to them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from loadtest.gpu.report import Job, Row
from loadtest.gpu.scale import Decoder
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
        models = job.attempt(f"building, {TITLES[weights]}", partial(build, job, weights))
        if models is None:
            continue
        rows_of: dict[int, Row] = {rows: {"what": TITLES[weights], "rows": rows} for rows in job.scale.all_rows}
        try:
            for rows, row in rows_of.items():
                row["base"] = job.attempt(f"{TITLES[weights]}, {rows} rows, base", partial(models.step, rows, 0))
            wrapped = job.attempt(f"{TITLES[weights]}, adapters", partial(models.add_adapters, max(rows_of)))
            for rows, row in rows_of.items() if wrapped else ():
                for name, adapters in (("1 adapter", 1), (f"one each, r={job.scale.rank}", rows)):
                    what = f"{TITLES[weights]}, {rows} rows, {name}"
                    row[name] = job.attempt(what, partial(models.step, rows, adapters))
        finally:
            for row in rows_of.values():
                job.report.row(row)
        del models


class Peer:
    """The two models, and how a step of the whole one is told from theirs."""

    def __init__(self, job: Job, models: dict[int, Any]) -> None:
        self._job, self._scale, self._models = job, job.scale, models
        self._device = torch.device(job.scale.device)
        self._names: list[str] = []

    def add_adapters(self, count: int) -> bool:
        """`count` random adapters of the scale's rank on every linear layer of each model."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self._scale.rank,
            lora_alpha=2 * self._scale.rank,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
            init_lora_weights=False,  # or B would be zeros
        )
        self._names = [f"a{i}" for i in range(count)]
        for layers, model in self._models.items():
            wrapped: Any = get_peft_model(model, config, adapter_name="a0")
            for name in self._names[1:]:
                wrapped.add_adapter(name, config)
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    # A branch of unit size, forty times, is no model any more; and fp32 factors are slower.
                    parameter.data = parameter.data.mul_(0.1).to(torch.bfloat16)
            self._models[layers] = wrapped.eval()
        return True

    def step(self, rows: int, adapters: int) -> float:
        """Device milliseconds of a step of all layers."""
        (low, fast), (high, slow) = sorted(
            (layers, self._timed(m, rows, adapters)) for layers, m in self._models.items()
        )
        return fast + (self._scale.steps.layers - low) * (slow - fast) / (high - low)

    def _timed(self, model: Any, rows: int, adapters: int) -> float:
        cache = self._cache(model, rows)
        ids = torch.randint(self._scale.steps.vocab, (rows, 1), device=self._device)
        options = {"adapter_names": [self._names[i % adapters] for i in range(rows)]} if adapters else {}

        def call() -> None:
            model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
            cache.crop(-1)  # views

        return took(call, self._device, warmups=self._scale.warmups, repeats=self._scale.repeats, seconds=1.0).device_ms

    def _cache(self, model: Any, rows: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        shape = (rows, self._scale.steps.kv_heads, self._scale.context - 1, self._scale.steps.head_dim)
        for layer in range(model.config.num_hidden_layers):
            keys, values = (torch.randn(shape, device=self._device).to(torch.bfloat16) for _ in range(2))
            cache.update(keys, values, layer)
        return cache


def build(job: Job, weights: Weights) -> Peer:
    """Both models with random weights."""
    return Peer(
        job, {n: random_transformer(job.scale.steps, n, job.scale.device, weights) for n in job.scale.peer_layers}
    )


def random_transformer(decoder: Decoder, layers: int, device: str, weights: Weights) -> Any:
    """transformers' own model of this shape, cut to some layers, in bf16 or with bitsandbytes' 4-bit layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**decoder.config(layers))
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model = model.eval().requires_grad_(False)
        return to_nf4(model) if weights == "nf4" else model

"""Bases and adapters to merge, and the two ways to answer: batched here, dense in transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from loramux.lora.adapter import Adapter
from loramux.lora.limits import ReadLimits
from loramux.lora.peft_files import read_adapter
from loramux.model.causal_lm import flat_inputs
from loramux.model.loading import load_model
from loramux.ops.segment import Segment
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.model.tiny import dense_copy, greedy_flat

PROMPT = [5, 17, 99, 3, 42, 8, 77]
STEPS = 8


def peft_adapter(base: Path, folder: Path, **options: object) -> Path:
    """A random adapter, by PEFT itself."""
    torch.manual_seed(1)
    model = get_peft_model(dense_copy(base), LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
        if "lora_magnitude_vector" in name:
            parameter.data *= 1 + torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    return folder


def batched(
    base: Path, adapters: Mapping[Path, float], dtype: str = "fp32", steps: int = STEPS
) -> tuple[torch.Tensor, list[int]]:
    """Logits [prompt, V] and the greedy continuation of PROMPT, with the adapters' branches over NF4."""
    model = load_model(str(base), dtype=dtype).model
    sites, dequantize = model.sites, model.dequantize
    weights = [
        (Adapter.build(read_adapter(f, sites, limits=ReadLimits()), sites, model.device, model.dtype, dequantize), w)
        for f, w in adapters.items()
    ]
    model.allocate_kv(32, 4)
    rows = [Segment(0, len(PROMPT), weight, adapter.weights) for adapter, weight in weights]
    logits = model.forward(flat_inputs([(PROMPT, 0)], 4, rows)).float()
    whole = [Segment(0, 1, weight, adapter.weights) for adapter, weight in weights]
    return logits, greedy_flat(model, [PROMPT], steps, whole)[0]


def dense(folder: Path, steps: int = STEPS) -> tuple[torch.Tensor, list[int]]:
    """The same by transformers alone, from a merged folder."""
    return answers(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), steps)


@torch.inference_mode()
def answers(model: Any, steps: int = STEPS) -> tuple[torch.Tensor, list[int]]:
    """The same by a model of transformers or PEFT."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, pad_token_id=0
    )
    return model(ids).logits[0].float(), out[0, len(PROMPT) :].tolist()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def scale_deltas(folder: Path, factors: Mapping[str, float]) -> None:
    """Multiply each layer's B by its factor."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for layer, factor in factors.items():
        tensors[f"base_model.model.{layer}.lora_B.weight"] *= factor
    save_file(tensors, path)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found

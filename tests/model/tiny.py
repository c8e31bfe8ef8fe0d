"""Tiny random models of many families, and a greedy loop that drives a served model flat, without an engine."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.loading import dequantized_model
from loramux.ops.segment import Segment
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough that attention decides the logits: with the usual 0.02 a wrong mask would hardly show.
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "sliding_window": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {"sliding_window": 7, "query_pre_attn_scalar": 16},
    "phi3": {},
    "gpt2": {},
}


def make_config(family: str, **overrides: Any) -> Any:
    """A small config of `family`."""
    options = COMMON | FAMILIES.get(family, {}) | overrides
    if family == "gpt2":
        options = {
            "vocab_size": 128,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
        } | overrides
    return CONFIG_MAPPING[family](**options)


def save_tiny(family: str, folder: Path, **overrides: Any) -> Path:
    """Write a random model of `family` into `folder` and return the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family, **overrides), dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return folder


@functools.lru_cache(maxsize=4)
def _dense(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    return dequantized_model(folder, dtype)


def dense_copy(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """`dequantized_model` of a folder whose content never changes; quicker for one that was asked for already."""
    return copy.deepcopy(_dense(str(folder), dtype))


def greedy_flat(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    steps: int,
    segments: Sequence[Segment] = (),
    chunk: int = 1 << 30,
) -> list[list[int]]:
    """Greedy continuation of all prompts together, prefilled in chunks; segments name *sequences*, not rows."""
    reserve = 64
    model.allocate_kv(len(prompts) * reserve // 4, 4)
    tokens = [list(p) for p in prompts]
    cached = [0] * len(prompts)
    while min(len(t) - len(p) for t, p in zip(tokens, prompts, strict=True)) < steps:
        upto = [min(c + chunk, len(t)) for c, t in zip(cached, tokens, strict=True)]
        views = [(t[:u], c) for t, u, c in zip(tokens, upto, cached, strict=True)]
        starts = [0]
        for view, done in views:
            starts.append(starts[-1] + len(view) - done)
        rows = [Segment(starts[s.start], starts[s.stop], s.weight, s.sites) for s in segments]
        logits = model.forward(flat_inputs(views, 4, rows, "last", reserve))
        for i, row in enumerate(logits):
            cached[i] = upto[i]
            if upto[i] == len(tokens[i]):
                tokens[i].append(int(row.argmax()))
    return [t[len(p) : len(p) + steps] for t, p in zip(tokens, prompts, strict=True)]

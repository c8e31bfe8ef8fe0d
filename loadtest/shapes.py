"""Which linear layers a base model has, and their sizes, from its config.json alone.

Knows decoders laid out like llama (llama, mistral, qwen2, qwen3, gemma …). Does not know any tensor, and
does not know fused layouts (phi3), Conv1D (gpt2) or experts: those are refused by name rather than guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Linear(NamedTuple):
    """One linear layer: its module path in the Hugging Face model; its weight is [outputs, inputs]."""

    path: str
    inputs: int
    outputs: int

    @property
    def leaf(self) -> str:
        """Its module name, e.g. "q_proj"."""
        return self.path.rsplit(".", 1)[-1]


LLAMA_LIKE = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "smollm3"}
)

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
}
"""Configs of the names that need no download, cut down to what `linear_shapes` reads."""


def read_config(model: str) -> Mapping[str, Any]:
    """Return the config of a known name, a Hugging Face folder or a config.json file.

    Raises FileNotFoundError for anything else.
    """
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        known = ", ".join(sorted(SHAPES))
        raise FileNotFoundError(f"{model!r} is no known name ({known}), no folder with a config.json and no such file")
    config: dict[str, Any] = json.loads(file.read_text())
    return config


def linear_shapes(config: Mapping[str, Any]) -> list[Linear]:
    """Return every linear layer of a llama-like decoder, in the order of the forward pass.

    Raises ValueError for a `model_type` whose layout is not known to be llama's.
    """
    kind = config.get("model_type", "")
    if kind not in LLAMA_LIKE:
        raise ValueError(f"the layout of model_type {kind!r} is not known; known are {', '.join(sorted(LLAMA_LIKE))}")
    hidden = int(config["hidden_size"])
    inner = int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    layer = [
        ("self_attn.q_proj", hidden, heads * head_dim),
        ("self_attn.k_proj", hidden, kv_heads * head_dim),
        ("self_attn.v_proj", hidden, kv_heads * head_dim),
        ("self_attn.o_proj", heads * head_dim, hidden),
        ("mlp.gate_proj", hidden, inner),
        ("mlp.up_proj", hidden, inner),
        ("mlp.down_proj", inner, hidden),
    ]
    return [
        Linear(f"model.layers.{i}.{name}", inputs, outputs)
        for i in range(int(config["num_hidden_layers"]))
        for name, inputs, outputs in layer
    ]


def select_targets(linears: list[Linear], targets: str) -> list[Linear]:
    """Return the layers named by "all-linear" or by a comma-separated list of module names.

    Raises ValueError for a name that no layer has.
    """
    if targets == "all-linear":
        return linears
    names = {name.strip() for name in targets.split(",")}
    leaves = {linear.leaf for linear in linears}
    if unknown := names - leaves:
        raise ValueError(
            f"no layer is named {', '.join(map(repr, sorted(unknown)))}; "
            f"choose all-linear or from {', '.join(sorted(leaves))}"
        )
    return [linear for linear in linears if linear.leaf in names]

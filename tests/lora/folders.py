"""Adapter folders for tests, written byte by byte, so that they can be wrong in every way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from loramux.lora.limits import ReadLimits
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE
from loramux.ops.site import Site
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, KV = 16, 24, 8
LIMITS = ReadLimits()

_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
SITES = tuple(
    Site(index, f"model.layers.{layer}.{name}", *_SHAPES[name])
    for index, (layer, name) in enumerate((layer, name) for layer in range(2) for name in _SHAPES)
)
BY_NAME = {site.name: site for site in SITES}
Q0 = "model.layers.0.self_attn.q_proj"
K0 = "model.layers.0.self_attn.k_proj"
V0 = "model.layers.0.self_attn.v_proj"


def factors(
    *modules: str,
    rank: int = 2,
    prefix: str = "base_model.model.",
    seed: int = 0,
    bias: bool = False,
    dora: bool = False,
    pooling: int = 1,
) -> dict[str, Tensor]:
    """Random fp32 tensors for `modules`, under PEFT's keys."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        site = BY_NAME[module]
        key = f"{prefix}{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, site.in_features // pooling, generator=random)
        tensors[f"{key}.lora_B.weight"] = torch.randn(site.out_features, rank, generator=random)
        if bias:
            tensors[f"{key}.lora_B.bias"] = torch.randn(site.out_features, generator=random)
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = torch.randn(site.out_features, generator=random)
    return tensors


def config(**fields: object) -> dict[str, object]:
    """A minimal adapter_config.json: r=2, alpha=4."""
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **fields}


def write(folder: Path, tensors: Mapping[str, Tensor] | None = None, **fields: object) -> Path:
    """A whole adapter folder; without `tensors` a good one for Q0. Its config selects what the tensors are for."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = factors(Q0) if tensors is None else tensors
    modules = {key.partition(".lora_")[0].rpartition(".")[2] for key in tensors if ".lora_" in key}
    (folder / CONFIG_FILE).write_text(json.dumps(config(**{"target_modules": sorted(modules), **fields})))
    save_file(dict(tensors), folder / WEIGHTS_FILE)
    return folder


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file from its parts, which need not agree."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data

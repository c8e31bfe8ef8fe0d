"""A site: one linear layer of the base that adapters may change."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Site:
    """One linear layer, as adapters see it. Holds no tensor and imports no torch.

    `index` is its place in the model's tuple of sites; `name` its module path in the Hugging Face model, e.g.
    "model.layers.3.self_attn.q_proj"; `transposed` says that the original module is a Conv1D (GPT-2), whose weight
    is stored [in, out]; LoRA tensors have the usual shapes A [r, in] and B [out, r] all the same.
    """

    index: int
    name: str
    in_features: int
    out_features: int
    transposed: bool = False

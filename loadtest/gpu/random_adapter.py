"""Adapters for a random model, placed by the server's own `Adapter.build`, without a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
from loramux.lora.adapter import Adapter
from loramux.lora.peft_config import parse_config
from loramux.lora.peft_files import AdapterFiles, SiteFactors
from loramux.model.causal_lm import CausalLM

STRENGTH = 0.1  # how large the branch is beside its input


class RandomAdapters:
    """Builds adapters of the ranks in turn, no more than are asked for. They share random numbers, not memory."""

    def __init__(self, model: CausalLM, ranks: Sequence[int]) -> None:
        self._model = model
        self._ranks = tuple(ranks)
        self._built: list[Adapter] = []
        largest = max(max(site.in_features, site.out_features) for site in model.sites) * max(ranks)
        generator = torch.Generator().manual_seed(0)
        # Some more than the largest factor, so that factors begin at different places.
        self._pool = torch.randn(largest + (1 << 16), generator=generator).to(torch.bfloat16)

    def take(self, count: int) -> list[Adapter]:
        """The first `count` of them, on the model's device."""
        while len(self._built) < count:
            self._built.append(self._build(len(self._built)))
        return self._built[:count]

    def _build(self, index: int) -> Adapter:
        rank = self._ranks[index % len(self._ranks)]
        factors = []
        for site in self._model.sites:
            start = (7919 * index + 104729 * site.index) % (1 << 16)
            a, b = (
                self._pool[start : start + rows * columns].view(rows, columns)
                for rows, columns in ((rank, site.in_features), (site.out_features, rank))
            )
            factors.append(SiteFactors(site, rank, STRENGTH / math.sqrt(site.in_features * rank), a, b))
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
        files = AdapterFiles(parse_config(json.dumps(config).encode()), f"random-{index}", tuple(factors))
        return Adapter.build(files, self._model.sites, self._model.device, self._model.dtype)

"""What adapters add to the base, dense, one site at a time: ΔW = Σ w·s·B·A and Δb = Σ w·s·bias.

This is the sum that a mix serves (DESIGN §4 "Mix"), written out; one adapter is a mix of one with weight 1. Knows
nothing of the base's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.errors import InvalidAdapter
from loramux.lora.peft_files import AdapterFiles, SiteFactors
from loramux.ops.site import Site


class Delta:
    """The sum of weighted adapters. `terms` are (files, weight); their factors are kept, and nothing dense is."""

    def __init__(self, terms: Sequence[tuple[AdapterFiles, float]]) -> None:
        self.terms = tuple(terms)
        self._factors: dict[int, list[tuple[SiteFactors, float]]] = {}
        for files, weight in terms:
            if files.config.use_dora:
                # Its magnitude acts on W + s·B·A: no sum of factors is the whole change.
                raise InvalidAdapter(
                    "use_dora", "DoRA is not merged yet; serve it in the batch", reason="UNSUPPORTED_ADAPTER"
                )
            for factors in files.factors:
                self._factors.setdefault(factors.site.index, []).append((factors, weight * factors.scale))

    def changes(self, site: Site) -> bool:
        """Whether any adapter targets this site."""
        return site.index in self._factors

    def weight(self, site: Site, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """ΔW [N, K] (or some of its rows), computed in `dtype` from the factors as the files have them.

        Zeros for a site that no adapter targets.
        """
        count = len(range(site.out_features)[rows])
        total = torch.zeros(count, site.in_features, dtype=dtype)
        for factors, scale in self._factors.get(site.index, ()):
            a = factors.a.to(dtype).repeat_interleave(factors.pooling, dim=1)
            total.addmm_(factors.b[rows].to(dtype), a, alpha=scale)
        return total

    def bias(self, site: Site) -> Tensor | None:
        """Δb [N] in fp32; None where no adapter has a bias."""
        found = [(f.bias, scale) for f, scale in self._factors.get(site.index, ()) if f.bias is not None]
        if not found:
            return None
        return torch.stack([bias.float() * scale for bias, scale in found]).sum(dim=0)

"""What adapters do to the base, dense, one site at a time: W' = W + Σ w·s·B·A and b' = b + Σ w·s·bias; of a DoRA
adapter, which comes alone, W' = c ⊙ (W + s·B·A), where c is the magnitude over the norm of each row of that sum.

This is what a request with the same adapters and weights is served (DESIGN §4), written out; one adapter is a mix of
one with weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.lora.peft_files import AdapterFiles, SiteFactors
from loramux.ops.site import Site


class Delta:
    """Weighted adapters. `terms` are (files, weight) that keep lora.mixing's rule; their factors are kept, and nothing
    dense is."""

    def __init__(self, terms: Sequence[tuple[AdapterFiles, float]]) -> None:
        self.terms = tuple(terms)
        assert all(files.mixable for files, _ in terms) or [weight for _, weight in terms] == [1.0], "DoRA in a mix"
        self._factors: dict[int, list[tuple[SiteFactors, float]]] = {}
        for files, weight in terms:
            for factors in files.factors:
                self._factors.setdefault(factors.site.index, []).append((factors, weight))

    def changes(self, site: Site) -> bool:
        """Whether any adapter targets this site."""
        return site.index in self._factors

    def apply(self, site: Site, weight: Tensor, rows: slice = slice(None)) -> None:
        """Make W [N, K] (or some of its rows) W', in its place; computed in its dtype and on its device, from the
        factors as the files have them.

        Raises InvalidAdapter for a DoRA magnitude that does not fit the base.
        """
        for factors, share in self._factors.get(site.index, ()):
            factors.add_to(weight, share, rows)
            if factors.magnitude is not None:
                weight.mul_(factors.output_scale(weight, rows).unsqueeze(1))

    def bias(self, site: Site) -> Tensor | None:
        """b' - b [N] in fp32; None where no adapter has a bias."""
        found = [(f.bias, share * f.scale) for f, share in self._factors.get(site.index, ()) if f.bias is not None]
        if not found:
            return None
        return torch.stack([bias.float() * scale for bias, scale in found]).sum(dim=0)

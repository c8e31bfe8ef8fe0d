"""What an adapter is to an operation: low-rank factors per site, and the rows they apply to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """One adapter's factors at one site. alpha / r is already folded into `b` (and into `bias`).

    a: [r, in_features], b: [out_features, r], bias: [out_features] or None; all of one dtype (the compute dtype),
    on the model's device, contiguous views into the adapter's one flat buffer. Never written to.

    scale: float32 [out_features] or None: what the outputs are multiplied with, the base's included, its bias not
    (DoRA, Liu et al. 2024, arXiv:2402.09353: magnitude / norm).
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights(Mapping[int, LoraWeights]):
    """All factors of one adapter: a mapping site index → LoraWeights, and where they lie, for native kernels.

    buffer   [elements] one allocation in the compute dtype that `views` look into
    offsets  int64 [n_sites, 4] on the CPU: elements where A, B, bias and scale begin; -1 where there is none
    ranks    int32 [n_sites] on the CPU: 0 where the adapter leaves the site alone

    Learned from these once, for each step asks: `max_rank`, and `extras`, whether any site has a bias or a scale.
    """

    buffer: Tensor
    offsets: Tensor
    ranks: Tensor
    views: Mapping[int, LoraWeights]
    max_rank: int = field(init=False)
    extras: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_rank", int(self.ranks.max()))
        object.__setattr__(self, "extras", bool((self.offsets[:, 2:] >= 0).any()))

    def __getitem__(self, site: int) -> LoraWeights:
        return self.views[site]

    def __iter__(self) -> Iterator[int]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Rows start ≤ row < stop of a flat batch get `weight` times this adapter's branch.

    `sites` maps a site's index to its factors; a site that is missing is not changed. Segments may overlap (a mix)
    and rows may be in none (the base). Segments are sorted by start. One with a scale (DoRA) overlaps no other: what
    it does to the base's outputs cannot be added up.
    """

    start: int
    stop: int
    weight: float
    sites: Mapping[int, LoraWeights]

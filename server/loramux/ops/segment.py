"""What an adapter is to an operation: low-rank factors per site, and the rows they apply to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """One adapter's factors at one site. The scale is already folded into `b` (and into `bias`).

    a: [r, in_features], b: [out_features, r], bias: [out_features] or None; all of one dtype (the compute dtype),
    on the model's device, contiguous views into the adapter's one flat buffer. Never written to.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights(Mapping[int, LoraWeights]):
    """All factors of one adapter: a mapping site index → LoraWeights, and where they lie, for native kernels.

    buffer   [elements] one allocation in the compute dtype that `views` look into
    offsets  int64 [n_sites, 3] on the CPU: elements where A, B and bias begin; -1 where there is none
    ranks    int32 [n_sites] on the CPU: 0 where the adapter leaves the site alone
    """

    buffer: Tensor
    offsets: Tensor
    ranks: Tensor
    views: Mapping[int, LoraWeights]

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
    and rows may be in none (the base). Segments are sorted by start.
    """

    start: int
    stop: int
    weight: float
    sites: Mapping[int, LoraWeights]

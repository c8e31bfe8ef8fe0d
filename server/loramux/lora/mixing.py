"""Which adapters may be weighted and added up, and by how much: in a request and in a merge alike. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loramux.errors import InvalidRequest

# Kernels take weights as float32 or in the compute dtype, the narrowest of which (float16) ends at 65504.
MAX_WEIGHT = 10_000.0


class Part(NamedTuple):
    """One adapter of a mix. `mixable`: whether what it adds can be added to what others add; not so for DoRA."""

    name: str
    mixable: bool
    weight: float


def check_weight(weight: float, field: str) -> None:
    """Raise InvalidRequest, about `field`, unless every kernel can represent the weight: |weight| ≤ MAX_WEIGHT."""
    if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:  # also true of NaN
        limit = f"[{-MAX_WEIGHT:g}, {MAX_WEIGHT:g}]"
        raise InvalidRequest(
            field, f"must be in {limit}, got {weight!r}", metadata={"limit": limit, "given": repr(weight)}
        )


def check_mix(parts: Sequence[Part]) -> None:
    """Raise InvalidRequest for a weight out of range, or an adapter that is mixed and cannot be. One alone with weight
    1 is no mix."""
    for i, part in enumerate(parts):
        check_weight(part.weight, f"mix[{i}].weight")
        if not part.mixable and (len(parts) > 1 or part.weight != 1.0):
            raise InvalidRequest(
                f"mix[{i}].adapter",
                f"{part.name!r} is a DoRA adapter: it scales the base's outputs, so it cannot be weighted or "
                "added to others; ask for it alone, with weight 1",
                reason="ADAPTER_NOT_MIXABLE",
                metadata={"adapter": part.name},
            )

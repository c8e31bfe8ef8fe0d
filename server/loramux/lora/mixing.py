"""Which adapters may be weighted and added up: in a request and in a merge alike. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loramux.errors import InvalidRequest


class Part(NamedTuple):
    """One adapter of a mix. `mixable`: whether what it adds can be added to what others add; not so for DoRA."""

    name: str
    mixable: bool
    weight: float


def check_mix(parts: Sequence[Part]) -> None:
    """Raise InvalidRequest for an adapter that is mixed and cannot be. One alone with weight 1 is no mix."""
    for i, part in enumerate(parts):
        if not part.mixable and (len(parts) > 1 or part.weight != 1.0):
            raise InvalidRequest(
                f"mix[{i}].adapter",
                f"{part.name!r} is a DoRA adapter: it scales the base's outputs, so it cannot be weighted or "
                "added to others; ask for it alone, with weight 1",
                reason="ADAPTER_NOT_MIXABLE",
                metadata={"adapter": part.name},
            )

"""One adapter of a merge. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loramux.lora.folder import AdapterFolder


@dataclass(frozen=True, slots=True)
class Ingredient:
    """An adapter to merge. `digest`, if given, is what its files must have."""

    name: str
    folder: AdapterFolder | Path
    weight: float = 1.0
    digest: str = ""

"""Many things in pieces, between which the event loop may turn to others. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

PIECE = 256  # adapters that are registered in one go: some milliseconds

Item = TypeVar("Item")


def pieces(items: Iterable[Item], size: int = PIECE) -> Iterator[list[Item]]:
    """Lists of up to `size` of `items`, in their order."""
    left = iter(items)
    while piece := list(islice(left, size)):
        yield piece

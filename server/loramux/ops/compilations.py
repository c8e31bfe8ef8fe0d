"""How many kernels Triton has made ready in this process: compiled, or loaded from its cache on disk."""

from __future__ import annotations

from functools import cache
from typing import Any


class Compilations:
    """Counts from now on; a listener that was there is still told."""

    def __init__(self) -> None:
        from triton import knobs

        self.count = 0
        self._next = knobs.compilation.listener
        knobs.compilation.listener = self._note

    def _note(self, **what: Any) -> None:
        self.count += 1
        if self._next is not None:
            self._next(**what)


@cache
def compilations() -> Compilations:
    """The process's own. Needs Triton; call it before the first kernel runs."""
    return Compilations()

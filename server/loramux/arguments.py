"""Keyword arguments that are given as a TypedDict, which Python itself does not check. Imports nothing of loramux."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches


def check_names(given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for the first of `given` that is none of `known`; it names what may be meant."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise TypeError(f"there is no argument {name!r}; {hint}")

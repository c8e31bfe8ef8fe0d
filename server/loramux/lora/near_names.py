"""Which of many names may be meant by one that nothing has, at a bounded cost. Imports no torch."""

from __future__ import annotations

from difflib import SequenceMatcher
from itertools import chain, islice

_BEGINNINGS = (12, 8, 4, 1)  # characters that a near name has in common: these, or those at the end
_END = 4
_MOST_COMPARED = 128
_MOST_NAMED = 3
_LIKENESS = 0.75


class NearNames:
    """Names by how they begin and end; case does not count."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, int], dict[str, None]] = {}

    def add(self, name: str) -> None:
        """Know `name`."""
        for key in _keys(name):
            self._by_key.setdefault(key, {})[name] = None

    def remove(self, name: str) -> None:
        """Forget `name`."""
        for key in _keys(name):
            names = self._by_key.get(key)
            if names is not None and names.pop(name, "") is None and not names:
                del self._by_key[key]

    def of(self, name: str) -> list[str]:
        """Up to three that are like `name`, the likest first."""
        with_a_key = chain.from_iterable(self._by_key.get(key, ()) for key in _keys(name))
        compared = set(islice(with_a_key, _MOST_COMPARED))
        matcher = SequenceMatcher(b=name.casefold(), autojunk=False)
        likest = []
        for candidate in sorted(compared):
            matcher.set_seq1(candidate.casefold())
            if matcher.real_quick_ratio() >= _LIKENESS and matcher.quick_ratio() >= _LIKENESS:
                likest.append((-matcher.ratio(), candidate))
        return [candidate for likeness, candidate in sorted(likest)[:_MOST_NAMED] if -likeness >= _LIKENESS]


def _keys(name: str) -> list[tuple[str, int]]:
    folded = name.casefold()
    return [(folded[-_END:], -_END), *((folded[:length], length) for length in _BEGINNINGS if length <= len(folded))]

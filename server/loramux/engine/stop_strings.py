"""Finds stop strings in text that comes in pieces, holding back only what may still become one.

The text of special tokens is not part of the answer, but a stop string may name them: it is then looked for twice, as
the text that it is, and with each of its special tokens as one symbol between the characters of the answer. So "b" is
not found in the token "<b>", and "end<b>" is found where that token follows the word.

Knows nothing of tokens but the ids of special ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

Symbol = str | int  # a character, or a special token's id


class _Pattern:
    """One stop string as symbols, for Knuth–Morris–Pratt. Never changes.

    fallback  the longest proper border of each prefix
    chars     how many symbols of each prefix are characters
    """

    __slots__ = ("chars", "fallback", "symbols", "text")

    def __init__(self, text: str, symbols: Sequence[Symbol]) -> None:
        self.text = text
        self.symbols = symbols
        self.fallback = [0] * (len(symbols) + 1)
        self.chars = [0]
        for i, symbol in enumerate(symbols):
            self.chars.append(self.chars[-1] + isinstance(symbol, str))
            if i > 0:
                self.fallback[i + 1] = self.advance(self.fallback[i], symbol)

    @property
    def has_tokens(self) -> bool:
        """Whether some symbol is a special token."""
        return self.chars[-1] < len(self.symbols)

    def advance(self, matched: int, symbol: Symbol) -> int:
        """With how many of its symbols the stream ends after `symbol`, if it was `matched` (not all) before."""
        while matched and symbol != self.symbols[matched]:
            matched = self.fallback[matched]
        return matched + (symbol == self.symbols[matched])


class _Patterns:
    """The stop strings of a request. What is looked for is worked out when the first text comes, not while a thousand
    requests are queued."""

    def __init__(self, stops: Sequence[str], split: Callable[[str], Sequence[Symbol]]) -> None:
        self._stops = stops
        self._split = split

    @cached_property
    def all(self) -> list[_Pattern]:
        patterns = [_Pattern(stop, stop) for stop in self._stops]
        for stop in self._stops:
            symbols = self._split(stop)
            if any(isinstance(symbol, int) for symbol in symbols):
                patterns.append(_Pattern(stop, symbols))
        return patterns


class StopScanner:
    """`found` is the stop string that ended the text, or "".

    The first symbol that completes one ends the text; if it completes several, the longest counts. The characters of
    such a stop string are never given out.
    """

    __slots__ = ("_held", "_matched", "_patterns", "_shared", "found")

    def __init__(self, stops: Sequence[str], split: Callable[[str], Sequence[Symbol]] = tuple) -> None:
        """`stops`: non-empty strings. `split` finds the special tokens in one of them."""
        self._start(_Patterns(stops, split) if stops else None)

    def fork(self) -> StopScanner:
        """One for the same stop strings in another text."""
        other = StopScanner.__new__(StopScanner)
        other._start(self._shared)
        return other

    def _start(self, shared: _Patterns | None) -> None:
        self._shared = shared
        self._patterns: list[_Pattern] = []
        self._matched: list[int] = []
        self._held = ""
        self.found = ""

    def feed(self, text: str, *, may_stop: bool = True) -> str:
        """Take text, return what is certainly part of the answer. Returns "" once a stop string was found.

        Without `may_stop` a stop string that is complete within the text is passed over; one that begins there is not.
        """
        if self.found or self._shared is None:
            return "" if self.found else text
        text, held = self._held + text, len(self._held)
        for i in range(held, len(text)):
            complete = self._take(text[i])
            if complete is not None and may_stop:
                return self._end(text[: i + 1], complete)
        return self._certain(text)

    def feed_special(self, token_id: int, *, may_stop: bool = True) -> str:
        """As `feed`, for a special token, which has no text of its own."""
        if self.found or self._shared is None:
            return ""
        complete = self._take(token_id)
        if complete is not None and may_stop:
            return self._end(self._held, complete)
        return self._certain(self._held)

    def flush(self) -> str:
        """The text ends here: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _take(self, symbol: Symbol) -> _Pattern | None:
        """The longest stop string that the symbol completes; None if it completes none."""
        if not self._patterns and self._shared is not None:
            self._patterns = self._shared.all
            self._matched = [0] * len(self._patterns)
        longest: _Pattern | None = None
        for i, pattern in enumerate(self._patterns):
            if isinstance(symbol, int) and not pattern.has_tokens:
                continue
            matched = pattern.advance(self._matched[i], symbol)
            if matched == len(pattern.symbols):
                matched = pattern.fallback[matched]
                if longest is None or len(pattern.text) > len(longest.text):
                    longest = pattern
            self._matched[i] = matched
        return longest

    def _end(self, text: str, complete: _Pattern) -> str:
        self.found = complete.text
        self._held = ""
        return text[: len(text) - complete.chars[-1]]

    def _certain(self, text: str) -> str:
        """`text` without the end that may become a stop string, which is held back."""
        keep = max((p.chars[matched] for p, matched in zip(self._patterns, self._matched, strict=True)), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

"""Finds stop strings in text that comes in pieces, holding back only what may still become one.

Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Pattern:
    """Knuth–Morris–Pratt: how many characters of `text` the stream ends with. Constant time a character."""

    __slots__ = ("fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self.fallback = [0] * (len(text) + 1)  # longest proper border of each prefix
        border = 0
        for i in range(1, len(text)):
            while border and text[i] != text[border]:
                border = self.fallback[border]
            border += text[i] == text[border]
            self.fallback[i + 1] = border

    def feed(self, char: str) -> bool:
        """Take one character; True when it completes the stop string. Not called again after that."""
        while self.matched and char != self.text[self.matched]:
            self.matched = self.fallback[self.matched]
        self.matched += char == self.text[self.matched]
        return self.matched == len(self.text)


class StopScanner:
    """`found` is the stop string that ended the text, or "".

    The first character that completes one ends the text; if it completes several, the longest counts. The
    characters of a stop string are never given out.
    """

    __slots__ = ("_held", "_patterns", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: non-empty strings."""
        self._patterns = [_Pattern(stop) for stop in stops]
        self._held = ""
        self.found = ""

    def feed(self, text: str) -> str:
        """Take text, return what is certainly part of the answer. Returns "" once a stop string was found."""
        if self.found or not self._patterns:
            return "" if self.found else text
        text, held = self._held + text, len(self._held)
        for i in range(held, len(text)):
            complete = [p.text for p in self._patterns if p.feed(text[i])]
            if complete:
                self.found = max(complete, key=len)
                self._held = ""
                return text[: i + 1 - len(self.found)]
        keep = max(p.matched for p in self._patterns)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text ends here: return what was held back."""
        held, self._held = self._held, ""
        return held

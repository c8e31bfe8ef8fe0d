"""What a token costs, learned from the last steps: how much prefill a step may take without keeping others waiting.

Knows nothing of sequences and reads no clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from itertools import accumulate

LEAST_CHUNK = 16  # tokens that a step always takes of the prompts: prefill goes on, however slow the machine
_STEPS = 8


class StepCosts:
    """Remembers the last steps that held prefill.

    A step of x tokens takes about fixed + c·x seconds; what is learned is its seconds per token, the fixed part
    included. With x = target / (seconds per token) again and again, x comes to where a step takes the target, and
    follows when longer contexts make tokens dearer.
    """

    def __init__(self) -> None:
        self._last: deque[tuple[float, int]] = deque(maxlen=_STEPS)  # seconds per token, tokens

    def note(self, tokens: int, seconds: float) -> None:
        """A step with prefill took so long; `tokens` are all of it, the decoded ones included."""
        self._last.append((seconds / tokens, tokens))

    def chunk(self, decoding: int, target: float) -> int | None:
        """Most tokens of prefill in a step in which `decoding` sequences get their next token, so that it takes about
        `target` seconds; None if that is no bound.

        At least LEAST_CHUNK, and half of `decoding`: where decoding alone takes longer than the target, prefill still
        gets a third of the time.
        """
        least = max(LEAST_CHUNK, decoding // 2)
        if not self._last:
            return least
        cost = self._seconds_per_token()
        return max(least, int(target / cost) - decoding) if cost > 0.0 else None

    def _seconds_per_token(self) -> float:
        """The median over the tokens of the last steps, for a step that something else held up says nothing; or what
        the last two steps agree on, if that is more."""
        costs = sorted(self._last)
        sums = list(accumulate(tokens for _, tokens in costs))
        median, _ = costs[bisect_left(sums, sums[-1] / 2)]
        if len(self._last) == 1:
            return median
        return max(median, min(self._last[-1][0], self._last[-2][0]))

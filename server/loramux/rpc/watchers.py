"""How many streams may wait for something to change: each costs memory, and a turn whenever it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loramux.errors import Overloaded

MOST = 256


class Watchers:
    """Those of one method. Event loop's thread."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """As long as one watches. Raises Overloaded if enough others do."""
        if self._count >= self._most:
            raise Overloaded(
                f"{self._count} streams watch already, and no more are served; end one, or ask again",
                reason="TOO_MANY_WATCHERS",
                metadata={"limit": self._most},
            )
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

"""A queue of the latest value for each key, for a reader that may be slow. Imports no torch.

One thread (the event loop's) writes and reads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from loramux.errors import SlowReader

Value = TypeVar("Value")


class Subscription(Generic[Value]):
    """Values wait under their key; a later value of a key takes the place of an earlier one that was not
    read.

    A reader who falls behind by more than `limit` keys loses the subscription, not some of the changes in silence:
    `next` then raises SlowReader (WATCH_TOO_SLOW), and the reader subscribes again.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[str, Value] = {}
        self._wake = asyncio.Event()
        self._overrun = False
        self._closed = False
        self.on_close: Callable[[], None] = lambda: None

    def put(self, key: str, value: Value) -> None:
        """Add or replace the value of `key`; the latest change comes last."""
        if self._closed:
            return
        self._waiting.pop(key, None)
        self._waiting[key] = value
        if len(self._waiting) > self._limit:
            self._overrun = True
            self.close()
        self._wake.set()

    async def next(self) -> Value | None:
        """The oldest waiting value; waits for one. None: the subscription was closed and all is read."""
        while not self._waiting:
            if self._overrun:
                raise SlowReader(
                    "this watcher reads too slowly and missed changes; watch again", reason="WATCH_TOO_SLOW"
                )
            if self._closed:
                return None
            self._wake.clear()
            await self._wake.wait()
        return self._waiting.pop(next(iter(self._waiting)))

    def close(self) -> None:
        """Take no more values. What waits may still be read, unless the reader was too slow."""
        if self._closed:
            return
        self._closed = True
        if self._overrun:
            self._waiting.clear()
        self.on_close()
        self._wake.set()

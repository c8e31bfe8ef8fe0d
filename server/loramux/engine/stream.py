"""One request's events between the engine and its reader. Lives on the event loop; imports no torch."""

from __future__ import annotations

import asyncio
from collections import deque

from loramux.engine.request import Delta, Event, Request, SequenceFinished


class Stream:
    """A buffer that never makes the writer wait: unread deltas of one sequence become one delta."""

    def __init__(self, request: Request, since: float) -> None:
        """`since` is when it was admitted, in time.monotonic() seconds."""
        self.request = request
        self.since = since
        self.ended = False  # the engine has said its last word
        self.pending_tokens = 0  # tokens that nobody has read yet
        self._events: deque[Event] = deque()
        self._open: dict[int, Delta] = {}  # the unread delta of each sequence
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event; the reader sees the events of each sequence in order, the request's last one last."""
        if isinstance(event, Delta):
            self.pending_tokens += len(event.token_ids)
            unread = self._open.get(event.index)
            if unread is not None:
                unread.merge(event)
                return
            self._open[event.index] = event
        else:
            self.ended = not isinstance(event, SequenceFinished) or event.last
        self._events.append(event)
        self._arrived.set()

    async def get(self) -> Event:
        """Wait for the next event. One reader only."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if isinstance(event, Delta):
            del self._open[event.index]
            self.pending_tokens -= len(event.token_ids)
        return event

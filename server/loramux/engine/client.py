"""The engine as the faces (rpc, http) see it. They import this, never the engine itself, and so no torch."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from loramux.engine.door import Limits
from loramux.engine.request import Event, Request
from loramux.engine.stats import EngineStats
from loramux.errors import LoramuxError


class EngineClient(Protocol):
    """All methods are called on the event loop's thread, except `stats`, `healthy` and `wake`: any thread."""

    @property
    def limits(self) -> Limits:
        """What requests must keep; see `door.check_request`."""
        ...

    @property
    def healthy(self) -> bool:
        """False after repeated faults or when the engine thread has died: health goes NOT_SERVING."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Run a request; the last event is a SequenceFinished with `last` set.

        Raises the request's error instead of yielding RequestFailed: InvalidRequest, Draining or Overloaded
        before anything runs; any LoramuxError later. Closing the iterator (or cancelling its reader) aborts
        the request. From the first iteration on, `on_finish(request)` is called exactly once, on this thread
        and before the last event or the error is seen, whatever happens.
        """
        ...

    def abort(self, request_id: str, error: LoramuxError) -> None:
        """End every live request of this id with `error`. Unknown ids are ignored: it may just have ended."""
        ...

    def wake(self) -> None:
        """Look at the waiting requests now: an adapter has been loaded, or its load has failed."""
        ...

    def stats(self) -> EngineStats:
        """The latest snapshot."""
        ...

    async def drain(self, timeout: float) -> int:  # noqa: ASYNC109 - the requests time out, not the call
        """Take no new requests, wait for the running ones, cancel what is left after `timeout` seconds.

        Returns how many were cancelled.
        """
        ...

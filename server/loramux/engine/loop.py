"""The engine's thread and its bridge to asyncio. Knows nothing of gRPC.

What crosses: requests and aborts through an inbox (deque + threading.Event), events back through an outbox
that goes to the event loop in one call_soon_threadsafe a step. Neither side ever waits for the other.

The outbox goes when the next batch is ready (where forward only launches work, once that is launched), so that the
loop writes to the clients while the model computes without the interpreter's lock; and a second thread, the
messenger, makes the call. Whoever wakes the loop gives the lock away and gets it back only after the loop has
written what it was woken for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from functools import partial
from queue import SimpleQueue

from tokenizers import Tokenizer

from loramux.engine.door import Limits
from loramux.engine.engine import FAULT_TEXT, Engine, Model
from loramux.engine.request import Event, Request, RequestFailed, SequenceFinished
from loramux.engine.settings import EngineSettings
from loramux.engine.stats import EngineStats
from loramux.engine.stream import Stream
from loramux.errors import Cancelled, DeviceLost, Draining, EngineFault, LoramuxError, Overloaded, SlowReader

log = logging.getLogger(__name__)

DEVICE_LOST_TEXT = "the server's device failed; the server ends, and is of use again once it was started anew"

_COMMANDS = 64  # most that are carried out between two steps: a thousand requests at once must not halt the streams
_SMOOTHING = 0.1
_MOST_RETRY_SECONDS = 60.0


class AsyncEngine:
    """Implements `client.EngineClient`, which says what each method may be called from.

    `device_lost` is set on the event loop when the device has failed for good and all requests have been told: only a
    new process can serve again.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        settings: EngineSettings,
        *,
        on_finish: Callable[[Request], None],
    ) -> None:
        """`on_finish(request)` gives the lease back; it runs on the event loop, see EngineClient.generate."""
        self._settings = settings
        self._on_finish = on_finish
        self._engine = Engine(model, tokenizer, settings, on_finish=self._engine_has_finished)
        self._thread = threading.Thread(target=self._run, name="loramux-engine", daemon=True)
        self._messenger = threading.Thread(target=self._carry, name="loramux-messenger", daemon=True)
        self._wake = threading.Event()
        self._inbox: deque[Callable[[], None]] = deque()
        self._outbox: list[Callable[[], None]] = []  # to be called on the event loop, in this order
        self._handed_over: SimpleQueue[list[Callable[[], None]] | None] = SimpleQueue()  # full outboxes; None: no more
        self._streams: dict[Request, Stream] = {}  # every request whose lease is still out
        self._idle = asyncio.Event()
        self._idle.set()
        self.device_lost = asyncio.Event()
        self._stats = self._engine.stats()
        self._alive = self._draining = self._stopping = False
        self._mean_seconds = 1.0
        self._loop: asyncio.AbstractEventLoop

    @property
    def limits(self) -> Limits:
        """See EngineClient."""
        return self._engine.limits

    @property
    def healthy(self) -> bool:
        """See EngineClient."""
        return self._alive and self._stats.healthy

    async def start(self) -> None:
        """Start the engine's thread; events go to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._alive = True
        self._messenger.start()
        self._thread.start()

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """See EngineClient."""
        try:
            stream = self._admit(request)
        except Exception:
            self._on_finish(request)
            raise
        try:
            while True:
                event = await stream.get()
                if isinstance(event, RequestFailed):
                    # One error may end many requests (a failed load): each raises it with its own traceback.
                    raise event.error.with_traceback(None)
                yield event
                if isinstance(event, SequenceFinished) and event.last:
                    return
        finally:
            if not stream.ended:
                self._post_abort(request, Cancelled("the client went away"))

    def abort(self, request_id: str, error: LoramuxError) -> None:
        """See EngineClient."""
        for request in self._streams:
            if request.request_id == request_id:
                self._post_abort(request, error)

    def wake(self) -> None:
        """See EngineClient."""
        self._wake.set()

    def lose_device(self, error: DeviceLost) -> None:
        """End as if the device had failed in a step: another thread has met that. Any thread may call it."""

        def met() -> None:
            raise error

        self._post(met)

    def stats(self) -> EngineStats:
        """See EngineClient."""
        return self._stats

    async def drain(self, timeout: float) -> int:  # noqa: ASYNC109 - the requests time out, not the call
        """See EngineClient."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        late = list(self._streams)
        for request in late:
            self._post_abort(request, Draining("the server is shutting down; ask another one"))
        await self._idle.wait()
        return len(late)

    async def stop(self) -> None:
        """End the thread; requests that still run are cancelled. The engine cannot be started again."""
        self._draining = self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
            await asyncio.to_thread(self._messenger.join)
        self._alive = False
        self._fail_all(lambda: Draining("the server has stopped"))

    # The event loop's side.

    def _admit(self, request: Request) -> Stream:
        """Take the request in or raise: InvalidRequest, Draining, Overloaded, EngineFault."""
        if self._draining:
            raise Draining("the server is shutting down and takes no new requests")
        if not self._alive:
            raise EngineFault("the engine is not running")
        self._engine.check(request)
        queued = len(self._streams) - self._stats.running
        if queued >= self._settings.max_queue:
            raise Overloaded(
                f"{queued} requests are waiting, and the queue takes at most {self._settings.max_queue}",
                retry_after=self._retry_after(queued),
                reason="QUEUE_FULL",
                metadata={"limit": self._settings.max_queue, "given": queued},
            )
        stream = self._streams[request] = Stream(request, time.monotonic())
        self._idle.clear()
        self._post(partial(self._submit, request, stream))
        return stream

    def _retry_after(self, queued: int) -> float:
        """Seconds until the queue has moved on, if requests take as long as the last ones did."""
        turns = 1 + queued / self._settings.max_batch_rows
        return min(_MOST_RETRY_SECONDS, self._mean_seconds * turns)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    def _post_abort(self, request: Request, error: LoramuxError) -> None:
        self._post(partial(self._engine.abort, request, error))

    def _deliver(self, calls: list[Callable[[], None]]) -> None:
        """What one step brought. No reader runs in between: a lease is back before the last event is read."""
        for call in calls:
            call()

    def _put(self, stream: Stream, event: Event) -> None:
        stream.put(event)
        if stream.pending_tokens > self._settings.max_pending_tokens and not stream.ended:
            error = SlowReader(
                f"the reader is more than {self._settings.max_pending_tokens} tokens behind",
                metadata={"limit": self._settings.max_pending_tokens},
            )
            self._post_abort(stream.request, error)

    def _release(self, request: Request) -> None:
        """The engine is done with a request: give its lease back, once."""
        stream = self._streams.pop(request, None)
        if stream is None:
            return
        self._mean_seconds += _SMOOTHING * (time.monotonic() - stream.since - self._mean_seconds)
        if not self._streams:
            self._idle.set()
        try:
            self._on_finish(request)
        except Exception:  # a defect of the owner; the other requests of this delivery must not lose their events
            log.exception("giving back the lease of request %r failed", request.shown_id)

    def _fail_all(self, error: Callable[[], LoramuxError]) -> None:
        """The engine's thread is gone: end what it left behind."""
        self._alive = False
        for stream in list(self._streams.values()):
            self._release(stream.request)
            stream.put(RequestFailed(error()))

    # The engine thread's side.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()  # before the inbox is read: what comes later sets it again
                for _ in range(min(len(self._inbox), _COMMANDS)):
                    self._inbox.popleft()()
                batch = self._engine.prepare()
                if batch is not None:
                    self._engine.compute(batch, meanwhile=self._flush)
                else:
                    self._flush()
                    if not self._inbox:
                        self._wake.wait(self._engine.idle_seconds())
            self._flush()
        except DeviceLost as error:
            self._alive = False
            log.critical("the device has failed, and no call to it can succeed any more", exc_info=error)
            fault = partial(EngineFault, DEVICE_LOST_TEXT, reason="DEVICE_LOST")
            self._outbox += (partial(self._fail_all, fault), self.device_lost.set)
            self._hand_over()
        except BaseException:
            log.exception("the engine's thread has died")
            self._alive = False
            self._outbox.append(partial(self._fail_all, partial(EngineFault, FAULT_TEXT)))
            self._hand_over()
        finally:
            self._handed_over.put(None)

    def _submit(self, request: Request, stream: Stream) -> None:
        sink = self._sink(stream)
        try:
            self._engine.submit(request, sink)
        except Exception:
            log.exception("request %r could not be queued", request.shown_id)
            self._engine_has_finished(request)
            sink(RequestFailed(EngineFault(FAULT_TEXT)))

    def _sink(self, stream: Stream) -> Callable[[Event], None]:
        return lambda event: self._outbox.append(partial(self._put, stream, event))

    def _engine_has_finished(self, request: Request) -> None:
        self._outbox.append(partial(self._release, request))

    def _flush(self) -> None:
        """All that happened since the last flush goes to the event loop; the snapshot is fresh by then."""
        self._stats = self._engine.stats()
        if self._outbox:
            self._hand_over()

    def _hand_over(self) -> None:
        self._handed_over.put(self._outbox)
        self._outbox = []

    # The messenger's side.

    def _carry(self) -> None:
        while (calls := self._handed_over.get()) is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._deliver, calls)

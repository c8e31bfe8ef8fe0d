"""One request on its way through the face: leased, tokenized, checked, handed to the engine, let go.

`Admission.admit` is the only road of requests, for every face. It holds the leases until the engine has taken the
request over; from then on the engine's `on_finish` releases them. So each lease is let go exactly by who holds it,
whichever way a request ends. Runs on the event loop's thread. Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from loramux.engine.client import EngineClient
from loramux.engine.door import check_prompt, check_request, check_sampling
from loramux.engine.request import AdapterUse, Delta, Event, Request, RequestFailed, SequenceFinished
from loramux.errors import EngineFault
from loramux.metrics import Metrics
from loramux.rpc import convert, request_ids, sizes
from loramux.rpc.merged import MergedOnly
from loramux.rpc.ports import Leases
from loramux.rpc.telemetry import RequestRecord
from loramux.rpc.tokenizing import Tokenizing
from loramux.v1 import generation_pb2 as pb


class Flight:
    """A checked request whose adapters are leased. `request_id` is the caller's; the engine knows another one."""

    def __init__(self, request: Request, engine: EngineClient, record: RequestRecord) -> None:
        self.request = request
        self.request_id = request.shown_id
        self.handed_over = False
        self._record = record
        self._events: AsyncGenerator[Event, None] = engine.generate(request)
        self._first: asyncio.Task[Event | None] | None = None
        self._first_seen = False
        self._landed = False

    async def start(self) -> None:
        """Hand the request to the engine. Raises what it refuses the request with: Draining, Overloaded, …"""
        self._first = asyncio.create_task(self._take_off())
        await asyncio.sleep(0)  # the engine accepts or refuses within its first turn
        if self._first.done() and not self._first.cancelled() and (error := self._first.exception()) is not None:
            self._record.taken = False
            raise error

    async def _take_off(self) -> Event | None:
        # No await in between: the engine owns the leases from the generator's first step on.
        self.handed_over = self._record.taken = True
        return await anext(self._events, None)

    async def resolved(self) -> None:
        """Until it is known what the adapters' names stand for: files that were never read have no digest yet."""
        assert self._first is not None
        if not all(use.handle.digest for use in self.request.adapters):
            await asyncio.wait([self._first])

    def __aiter__(self) -> Flight:
        return self

    async def __anext__(self) -> Delta | SequenceFinished:
        """What the engine delivers, after `start`. Ends after the last SequenceFinished, or raises."""
        assert self._first is not None
        if self._landed:
            raise StopAsyncIteration
        if self._first_seen:
            event = await anext(self._events, None)
        else:
            event = await self._first
            self._first_seen = True
        if event is None:
            raise EngineFault("the engine ended this request without finishing it")
        if isinstance(event, RequestFailed):
            raise event.error
        self._landed = isinstance(event, SequenceFinished) and event.last
        self._record.see(event)
        return event

    async def close(self) -> None:
        """Stop the engine's work on this request, if any is left."""
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.wait([self._first])
        if self._first is not None and not self._first.cancelled():
            self._first.exception()  # looked at, so that asyncio does not report it a second time
        await self._events.aclose()


class Admission:
    """Where requests become flights."""

    def __init__(
        self,
        engine: EngineClient,
        leases: Leases,
        tokenizing: Tokenizing,
        metrics: Metrics,
        check_open: Callable[[], None],
        merged: MergedOnly,
        chat_template: Callable[[str], Awaitable[str | None]] | None = None,
    ) -> None:
        """`check_open` raises what requests are refused with while the server starts or drains. `chat_template(uid)` is
        an adapter's own, if those are used."""
        self._merged = merged
        self._chat_template = chat_template
        self._engine = engine
        self._bounds = sizes.bounds(engine.limits)
        self._check_open = check_open
        self._leases = leases
        self._tokenizing = tokenizing
        self._metrics = metrics

    @asynccontextmanager
    async def admit(self, message: pb.GenerateRequest, seconds_left: float | None) -> AsyncIterator[Flight]:
        """A flight for this message, closed on the way out. `seconds_left` to its deadline, None without.

        Raises Draining, then InvalidRequest for what there is too much of, then AdapterNotFound before anything else is
        done, then InvalidRequest or Overloaded.
        """
        request_id = request_ids.current()
        asked_for = message.adapter[: request_ids.MAX_CHARACTERS]
        with RequestRecord(self._metrics, request_id, asked=asked_for, seconds_left=seconds_left) as record:
            self._check_open()
            sizes.check(message, self._engine.limits, self._bounds)
            async with self._leased(message, request_id, record) as flight:
                yield flight

    @asynccontextmanager
    async def _leased(
        self, message: pb.GenerateRequest, request_id: str, record: RequestRecord
    ) -> AsyncIterator[Flight]:
        ticket = uuid.uuid4().hex  # callers may reuse their ids while a request of theirs is live
        adapters: list[AdapterUse] = []
        flight: Flight | None = None
        try:
            asked = convert.adapter_names(message)
            self._merged.check_request(asked)
            handles = self._leases.lease([name for name, _ in asked], ticket) if asked else ()
            adapters += [AdapterUse(handle, weight) for handle, (_, weight) in zip(handles, asked, strict=True)]
            record.adapters = tuple(adapters)
            record.request = await self._request(message, ticket, request_id, record)
            flight = Flight(record.request, self._engine, record)
            try:
                yield flight
            finally:
                await flight.close()
        finally:
            if flight is None or not flight.handed_over:
                for use in adapters:
                    self._leases.release(use.handle.uid, ticket)

    async def count(self, message: pb.CountTokensRequest) -> list[int]:
        """The ids of an input that `admit` would take. Raises Draining, InvalidRequest or Overloaded."""
        self._check_open()
        sizes.check_input(message, self._bounds)
        ids = await self._tokenizing.ids(message)
        check_prompt(ids, self._engine.limits, convert.input_field(message))
        return ids

    async def _request(
        self,
        message: pb.GenerateRequest,
        ticket: str,
        request_id: str,
        record: RequestRecord,
    ) -> Request:
        sampling = convert.sampling(message.sampling)
        check_sampling(sampling, self._engine.limits)
        template = None
        if self._chat_template is not None and message.HasField("chat") and len(record.adapters) == 1:
            template = await self._chat_template(record.adapters[0].handle.uid)
        ids = tuple(await self._tokenizing.ids(message, template))
        priority = message.priority
        check_request(
            sampling,
            ids,
            self._engine.limits,
            request_id=message.request_id,
            cache_salt=message.cache_salt,
            priority=priority,
            adapters=record.adapters,
            prompt_field=convert.input_field(message),
        )
        return Request(
            request_id=ticket,
            prompt_ids=ids,
            sampling=sampling,
            adapters=record.adapters,
            cache_salt=message.cache_salt,
            priority=priority,
            arrival=record.arrival,
            deadline=record.deadline,
            caller_id=request_id,
        )

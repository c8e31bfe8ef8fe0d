"""Turns inputs into token ids in worker threads, so that a long prompt never holds up the event loop.

Bounded: when too many inputs wait, the next is refused. What no prompt can be is refused by its characters, the rest is
given up as soon as it is known to be too long, or when its caller has gone. Long texts have a thread of their own, and
in each thread the shortest is the next, so that a short one never waits for long ones. Knows nothing of requests beyond
their input.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import PriorityQueue

from loramux.engine.door import Limits, prompt_too_long
from loramux.errors import Cancelled, Overloaded
from loramux.rpc import convert
from loramux.rpc.ports import Tokenizer
from loramux.v1 import generation_pb2 as pb

_LONG = 16 << 10  # characters

AtLeast = Callable[[int], None]


class Tokenizing:
    """Two threads in front of a tokenizer, for short and for long texts. `max_waiting` counts the running ones too."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits, *, max_waiting: int = 1024) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._short = _Worker("tokenize-short")
        self._long = _Worker("tokenize-long")
        self._max_waiting = max_waiting
        self._places = threading.Semaphore(max_waiting)

    async def ids(self, message: pb.GenerateRequest | pb.CountTokensRequest, template: str | None = None) -> list[int]:
        """The ids of a message's input; `template` is a chat's, in place of the base's.

        Raises InvalidRequest or Overloaded.
        """
        field = convert.input_field(message)
        if field == "token_ids":
            return list(message.token_ids.ids)
        if field == "chat":
            turns = convert.chat(message.chat)
            chars = sum(len(turn["content"]) for turn in turns)
            return await self._run(
                lambda at_least: self._tokenizer.encode_chat(turns, at_least, template),
                field,
                chars,
                patient=template is not None,  # what comes with an adapter may take its time
            )
        text, parse_special = message.prompt, convert.parse_special(message)
        return await self._run(lambda at_least: self._tokenizer.encode(text, parse_special, at_least), field, len(text))

    async def _run(
        self, work: Callable[[AtLeast], list[int]], field: str, chars: int, patient: bool = False
    ) -> list[int]:
        max_context, longest = self._limits.max_context, self._tokenizer.longest_token
        if chars > max_context * longest:
            raise prompt_too_long(field, chars // longest, max_context, or_more=True)
        if not self._places.acquire(blocking=False):
            raise Overloaded(
                f"{self._max_waiting} prompts wait to be tokenized already; try again",
                reason="QUEUE_FULL",
                metadata={"limit": self._max_waiting},
            )
        gone = threading.Event()

        def at_least(tokens: int) -> None:
            if gone.is_set():
                raise Cancelled("the client went away")
            if tokens > self._limits.longest_prompt:
                raise prompt_too_long(field, tokens, max_context, or_more=True)

        future = (self._long if patient or chars > _LONG else self._short).submit(chars, lambda: work(at_least))
        # The place is free when the thread is done, not when the caller goes away: what has begun goes on for a moment.
        future.add_done_callback(lambda _: self._places.release())
        try:
            return await asyncio.wrap_future(future)
        finally:
            gone.set()

    def close(self) -> None:
        """Drop what has not begun."""
        self._short.close()
        self._long.close()


_Job = tuple[int, int, Callable[[], list[int]] | None, "Future[list[int]]"]  # chars, place, what to do (None: end)


class _Worker:
    """A thread that works on what is shortest, and on what came first of what is equally long."""

    def __init__(self, name: str) -> None:
        self._jobs: PriorityQueue[_Job] = PriorityQueue()
        self._serial = itertools.count()
        self._closed = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, chars: int, work: Callable[[], list[int]]) -> Future[list[int]]:
        """What comes of `work`; may be cancelled until it has begun."""
        future: Future[list[int]] = Future()
        if self._closed:
            future.cancel()
        else:
            self._jobs.put((chars, next(self._serial), work, future))
        return future

    def close(self) -> None:
        """Cancel what waits and what comes; the thread ends after what it is at."""
        self._closed = True
        self._jobs.put((-1, next(self._serial), None, Future()))

    def _run(self) -> None:
        while True:
            _, _, work, future = self._jobs.get()
            if work is None:
                break
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del work, future  # else the last text stays until the next comes
        while not self._jobs.empty():
            self._jobs.get()[3].cancel()

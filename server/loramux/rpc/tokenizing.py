"""Turns inputs into token ids in worker threads, so that a long prompt never holds up the event loop.

Bounded: when too many inputs wait, the next is refused. What no prompt can be is refused by its characters, the rest is
given up as soon as it is known to be too long, or when its caller has gone. Long texts have a thread of their own, so
that short ones never wait for them. Knows nothing of requests beyond their input.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
        self._short = ThreadPoolExecutor(1, thread_name_prefix="tokenize-short")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="tokenize-long")
        self._max_waiting = max_waiting
        self._places = threading.Semaphore(max_waiting)

    async def ids(self, message: pb.GenerateRequest | pb.CountTokensRequest) -> list[int]:
        """The ids of a message's input. Raises InvalidRequest or Overloaded."""
        field = convert.input_field(message)
        if field == "token_ids":
            return list(message.token_ids.ids)
        if field == "chat":
            turns = convert.chat(message.chat)
            chars = sum(len(turn["content"]) for turn in turns)
            return await self._run(lambda at_least: self._tokenizer.encode_chat(turns, at_least), field, chars)
        text, parse_special = message.prompt, convert.parse_special(message)
        return await self._run(lambda at_least: self._tokenizer.encode(text, parse_special, at_least), field, len(text))

    async def _run(self, work: Callable[[AtLeast], list[int]], field: str, chars: int) -> list[int]:
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

        future = (self._long if chars > _LONG else self._short).submit(work, at_least)
        # The place is free when the thread is done, not when the caller goes away: what has begun goes on for a moment.
        future.add_done_callback(lambda _: self._places.release())
        try:
            return await asyncio.wrap_future(future)
        finally:
            gone.set()

    def close(self) -> None:
        """Drop what has not begun."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)

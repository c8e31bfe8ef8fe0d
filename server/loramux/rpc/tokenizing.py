"""Turns inputs into token ids in worker threads, so that a long prompt never holds up the event loop.

Bounded: when too many inputs wait, the next is refused. Knows nothing of requests beyond their input.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from loramux.errors import Overloaded
from loramux.rpc import convert
from loramux.rpc.ports import Tokenizer
from loramux.v1 import generation_pb2 as pb


class Tokenizing:
    """A small pool of threads in front of a tokenizer. `max_waiting` counts the running ones too."""

    def __init__(self, tokenizer: Tokenizer, *, threads: int = 2, max_waiting: int = 1024) -> None:
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._max_waiting = max_waiting
        self._places = threading.Semaphore(max_waiting)

    async def ids(self, message: pb.GenerateRequest | pb.CountTokensRequest) -> Sequence[int]:
        """The ids of a message's input. Raises InvalidRequest or Overloaded."""
        kind = convert.input_field(message)
        if kind == "token_ids":
            return list(message.token_ids.ids)
        if kind == "chat":
            turns = convert.chat(message.chat)
            return await self._run(lambda: self._tokenizer.encode_chat(turns))
        text = message.prompt
        return await self._run(lambda: self._tokenizer.encode(text))

    async def _run(self, work: Callable[[], list[int]]) -> list[int]:
        if not self._places.acquire(blocking=False):
            raise Overloaded(
                f"{self._max_waiting} prompts wait to be tokenized already; try again",
                reason="QUEUE_FULL",
                metadata={"limit": self._max_waiting},
            )
        future = self._pool.submit(work)
        # The place is free when the thread is done, not when the caller goes away: work that has begun goes on.
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

"""Jobs on a few threads that the event loop can turn its back on. Imports no torch.

A thread cannot be stopped. So a job that is aborted or out of time ends for who waits for it at once, while its
thread goes on as a stray; what the thread holds counts as held until it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from loramux.errors import DeadlineExceeded, LoramuxError

_NICENESS = 10

Args = ParamSpec("Args")
Result = TypeVar("Result")


class Job:
    """Several calls in workers, one after another, with one deadline. `timeout` is in seconds from now."""

    def __init__(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        self.timeout = timeout
        self.deadline = loop.time() + timeout
        self.aborted: asyncio.Future[LoramuxError] = loop.create_future()
        self.stray: asyncio.Future[Any] | None = None

    def abort(self, error: LoramuxError) -> None:
        """End the call that runs, and every later one, with `error`."""
        if not self.aborted.done():
            self.aborted.set_result(error)

    async def wait(self, work: Coroutine[Any, Any, None]) -> None:
        """`work`, on the event loop. Raises what it raises; else as Workers.run does."""
        task = asyncio.ensure_future(work)
        ends: set[asyncio.Future[Any]] = {task, self.aborted}
        left = self.deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if self.aborted.done():
                raise self.aborted.result()
            if not task.done():
                raise DeadlineExceeded(f"its folder was being written for longer than {self.timeout:g} s")
            await task
        finally:
            task.cancel()

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call back once no worker is busy with this job: now, or when its stray ends."""
        if self.stray is None or self.stray.done():
            callback()
        else:
            self.stray.add_done_callback(lambda _: callback())


class Workers:
    """A pool of threads for jobs. Used by one event loop, in its thread."""

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_give_way)
        self._strays: set[asyncio.Future[Any]] = set()

    async def run(self, job: Job, function: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
        """function(*args, **kwargs) in a thread.

        Raises what it raises; the error that the job was aborted with; DeadlineExceeded when its time is up.
        """
        running = self._executor.submit(function, *args, **kwargs)
        future = asyncio.wrap_future(running)
        left = job.deadline - asyncio.get_running_loop().time()
        ends: set[asyncio.Future[Any]] = {future, job.aborted}
        try:
            await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if job.aborted.done():
                raise job.aborted.result()
            if future.done():
                return future.result()
            raise DeadlineExceeded(f"loading took longer than {job.timeout:g} s; is its disk or network slow?")
        finally:
            if not future.done():
                running.cancel()  # has an effect only if no thread took it yet
                job.stray = future
                self._strays.add(future)
            future.add_done_callback(self._ended)
            # An exception holds this frame; holding the exception in turn would keep what the thread read, say a
            # whole file, until the next full garbage collection.
            del running, future, ends

    async def close(self, grace: float) -> None:
        """Take no more calls, and wait up to `grace` seconds for strays."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._strays:
            _, late = await asyncio.wait(self._strays, timeout=grace)
            for future in late:
                future.cancel()  # its thread goes on, and its result finds nobody

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self._strays.discard(future)
        retrieve(future)


def _give_way() -> None:
    """Let the model's threads go first: hashing and converting a file takes tens of milliseconds of a core, which
    streams would feel as a gap. On Linux niceness is a thread's own."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def retrieve(future: asyncio.Future[Any]) -> None:
    """Look at an exception that nobody may wait for, so that asyncio does not report it."""
    if not future.cancelled():
        future.exception()

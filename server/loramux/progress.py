"""Long work as it is told: on a terminal one bar at a time, elsewhere log lines."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from loramux.escaping import escape

log = logging.getLogger(__name__)
Count = Callable[[int, int], None]

_EVERY_SECONDS = 10.0


class Phases:
    """The parts of long work, one after the other; a context manager, to be told from any thread.

    On a terminal the running phase has a bar, and what is over leaves nothing. Without one every phase is logged with
    its seconds when it is over, and one that counts at most every `every` seconds. `clock` is in seconds.
    """

    def __init__(
        self, console: Console | None, *, every: float = _EVERY_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bar: Progress | None = None
        self._silent = console is None
        if console is not None and console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
        self._every = every
        self._clock = clock
        self._lock = threading.Lock()
        self._title = ""
        self._task: TaskID | None = None
        self._began = self._told = 0.0

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._end(finished=kind is None)
        if self._bar is not None:
            self._bar.stop()

    def begin(self, title: str) -> None:
        """From now on this is done; what was done before is over."""
        with self._lock:
            self._begin(escape(title))

    def counting(self, title: str) -> Count:
        """A function (done, total) for work that begins when it is first called."""
        title = escape(title)

        def count(done: int, total: int) -> None:
            with self._lock:
                if title != self._title:
                    self._begin(title)
                self._count(done, total)

        return count

    def _begin(self, title: str) -> None:
        self._end(finished=True)
        self._title = title
        self._began = self._told = self._clock()
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=None)
        elif not self._silent:
            log.info("%s …", title)

    def _count(self, done: int, total: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif not self._silent and (now := self._clock()) - self._told >= self._every:
            self._told = now
            log.info("%s: %d of %d, %.0f s", self._title, done, total, now - self._began)

    def _end(self, *, finished: bool) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        elif self._title and finished and not self._silent:
            log.info("%s: done in %.1f s", self._title, self._clock() - self._began)
        self._title = ""


@contextmanager
def bar(console: Console, title: str) -> Iterator[Count]:
    """One bar from the beginning; nothing where there is no terminal. Yields a function (done, total)."""
    with Phases(console) as phases:
        phases.begin(title)
        yield phases.counting(title)

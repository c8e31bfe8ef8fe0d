"""Runs coroutines on a clock that jumps to the next timer: sleeps take no time, and their lengths are exact."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Never waits: the seconds that it was asked to wait are added to `now`."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += max(0.0, timeout or 0.0)
        return super().select(0)


class Clock:
    """The time of a loop, in seconds from its start."""

    def __init__(self) -> None:
        self._selector = _Selector()

    def __call__(self) -> float:
        return self._selector.now

    def pass_by(self, seconds: float) -> None:
        """Time passes while the loop stands still: something blocks it."""
        self._selector.now += seconds

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main`, which may sleep and wait for its own tasks, not for other threads or for sockets."""
        loop = asyncio.SelectorEventLoop(self._selector)
        loop.time = self  # type: ignore[method-assign]
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(main)


def run_virtual(main: Callable[[Clock], Coroutine[Any, Any, T]]) -> T:
    """The result of `main`, which is given the clock."""
    clock = Clock()
    return clock.run(main(clock))

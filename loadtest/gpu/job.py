"""What a part is given: what to measure, where to write it down, and how long it may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from loadtest.gpu.report import Report
from loadtest.gpu.shape import Scale

T = TypeVar("T")


class OutOfTime(Exception):
    """The part's time is up; what it has is written down."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one part. `deadline` is of time.monotonic; `bandwidth` in bytes a second, 0 if unknown."""

    scale: Scale
    report: Report
    deadline: float
    bandwidth: float = 0.0

    @property
    def left(self) -> float:
        """Seconds until the part should end."""
        return self.deadline - time.monotonic()

    def attempt(self, what: str, measure: Callable[[], T]) -> T | None:
        """What `measure` returns; None, with a problem in the report, if it fails.

        Raises OutOfTime instead of beginning too late, and what broke the device: nothing after it could be trusted.
        """
        if self.left <= 0:
            raise OutOfTime
        self.report.at(what)
        try:
            return measure()
        except OutOfTime:  # of an attempt within this one
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            self.report.problem(f"{what}: {text}")
            if type(error).__name__ == "AcceleratorError":
                raise
            return None

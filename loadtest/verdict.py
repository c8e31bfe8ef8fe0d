"""What happened in a soak, and what that means. Pure: knows no server and no clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from loadtest.report import percentile
from loadtest.trend import MIB, judge


@dataclass(slots=True)
class Sample:
    """One look at the server: seconds since the start, cycles done, resident bytes."""

    at: float
    cycles: int
    resident: int


@dataclass(slots=True)
class SoakLog:
    """What happened so far. `failures` counts "what: STATUS"; every entry is one too many."""

    cycles: int = 0
    loads: int = 0
    unloads: int = 0
    completed: int = 0
    cancelled: int = 0
    unloads_in_use: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)
    unload_seconds: list[float] = field(default_factory=list)
    stopped_early: str = ""

    @property
    def failed(self) -> int:
        """Failures of any kind."""
        return self.failures.total()


def verdict(log: SoakLog, before: dict[str, float], after: dict[str, float], duration: float) -> dict[str, Any]:
    """Judge a finished soak. `duration` is in seconds; sizes in the result are in MiB but for
    bytes_per_cycle.
    """
    problems = [log.stopped_early] if log.stopped_early else []
    problems += [f"{count} × {what}" for what, count in sorted(log.failures.items())]
    problems += [
        f"{name} is {after[name]:g}, was {before[name]:g} before the first load"
        for name in before
        if after[name] != before[name]  # NaN, a metric that is missing, is a problem as well
    ]
    memory: dict[str, float] = {}
    try:
        trend = judge([s.cycles for s in log.samples], [s.resident for s in log.samples])
    except ValueError as error:
        problems.append(f"memory was not judged: {error}")
    else:
        memory = {
            "rss_mib": trend.start / MIB,
            "rss_growth_mib": trend.growth / MIB,
            "rss_bound_mib": trend.bound / MIB,
            "rss_bytes_per_cycle": trend.slope,
        }
        if not trend.flat:
            problems.append(
                f"resident memory grew by {trend.growth / MIB:.1f} MiB after warm-up "
                f"({trend.slope:,.0f} bytes a cycle); {trend.bound / MIB:.1f} MiB are allowed"
            )
    return {
        "verdict": "fail" if problems else "pass",
        "problems": problems,
        "cycles": log.cycles,
        "loads": log.loads,
        "unloads": log.unloads,
        "unloads_in_use": log.unloads_in_use,
        "duration": duration,
        "cycles_per_second": log.cycles / duration,
        "completed": log.completed,
        "cancelled": log.cancelled,
        "failed": log.failed,
        **memory,
        "median_load_ms": percentile(log.load_seconds, 50) * 1000,
        "p99_load_ms": percentile(log.load_seconds, 99) * 1000,
        "median_unload_ms": percentile(log.unload_seconds, 50) * 1000,
        "p99_unload_ms": percentile(log.unload_seconds, 99) * 1000,
        "counts_before": before,
        "counts_after": after,
    }

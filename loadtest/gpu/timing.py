"""How long something takes on a device: CUDA events there, the clock on a CPU; medians, after a warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

LEAST = 3
_replays: list[tuple[Any, Any]] = []


class Took(NamedTuple):
    """Median milliseconds of one call: on the device (`replay_ms`: in the CUDA graph that it replays), and on the clock
    until the device was done."""

    device_ms: float
    wall_ms: float
    replay_ms: float | None = None

    @property
    def best(self) -> float:
        """Of the replay, if there was one: what the device takes whatever the host does beside it."""
        return self.device_ms if self.replay_ms is None else self.replay_ms


def took(call: Callable[[], object], device: torch.device, *, warmups: int, repeats: int, seconds: float = 2.0) -> Took:
    """Time `call`, waiting for the device after each, as a decoding loop has to. At most about `seconds`, but LEAST
    times in any case."""
    for _ in range(warmups):
        call()
    synchronize(device)
    _replays.clear()
    on_device: list[float] = []
    on_clock: list[float] = []
    end = time.monotonic() + seconds
    while len(on_clock) < repeats and (len(on_clock) < LEAST or time.monotonic() < end):
        begin = time.perf_counter()
        if device.type == "cuda":
            events = between_events(call)
            events[1].synchronize()
            on_device.append(events[0].elapsed_time(events[1]))
        else:
            call()
        on_clock.append((time.perf_counter() - begin) * 1e3)
    replays = [start.elapsed_time(stop) for start, stop in _replays]
    return Took(median(on_device or on_clock), median(on_clock), median(replays) if replays else None)


def between_events(call: Callable[[], object]) -> tuple[Any, Any]:
    """Two events of the current stream, before and after what `call` launches."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    return start, stop


def watch_replays() -> None:
    """From now on, for the rest of the process, every replay of a CUDA graph lies between two events that `took` reads:
    what the host writes before is not in there. Of graphs that are recorded later, by whomever."""
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        _replays.append(between_events(lambda: replay(graph)))

    torch.cuda.CUDAGraph.replay = timed  # type: ignore[method-assign, assignment]


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """Replays the kernels that `run`, warm already, launches: without the host's launches. Raises RuntimeError if it
    does what no graph can hold."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()

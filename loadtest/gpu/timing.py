"""How long something takes on a device: CUDA events there, the clock on a CPU; medians, after a warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch

LEAST = 3


class Took(NamedTuple):
    """Median milliseconds of one call: on the device, and on the clock until the device was done."""

    device_ms: float
    wall_ms: float


def took(call: Callable[[], object], device: torch.device, *, warmups: int, repeats: int, seconds: float = 2.0) -> Took:
    """Time `call`, waiting for the device after each, as a decoding loop has to. At most about `seconds`, but LEAST
    times in any case."""
    for _ in range(warmups):
        call()
    synchronize(device)
    on_device: list[float] = []
    on_clock: list[float] = []
    end = time.monotonic() + seconds
    while len(on_clock) < repeats and (len(on_clock) < LEAST or time.monotonic() < end):
        begin = time.perf_counter()
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            on_device.append(start.elapsed_time(stop))
        else:
            call()
        on_clock.append((time.perf_counter() - begin) * 1e3)
    return Took(median(on_device or on_clock), median(on_clock))


def each_took(
    calls: Sequence[Callable[[], object]], device: torch.device, *, warmups: int, repeats: int
) -> tuple[float, bool]:
    """Median device microseconds of one of `calls`, run one after another; and whether from a CUDA graph, which takes
    the host's launches out of the figure."""

    def run() -> None:
        for call in calls:
            call()

    run()
    replay = captured(run) if device.type == "cuda" else None
    spent = took(replay or run, device, warmups=warmups, repeats=repeats, seconds=0.2)
    return spent.device_ms * 1e3 / len(calls), replay is not None


def captured(run: Callable[[], object]) -> Callable[[], None] | None:
    """Replays the kernels that `run`, warm already, launches; None if it does what no graph can hold."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()

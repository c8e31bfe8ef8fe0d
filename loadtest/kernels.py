"""The native operations one by one, beside the reference, bitsandbytes and what the machine can do at most.

Shapes are those of the embedded model. Every linear operation has thirty copies, as the model has layers, so that
weights come from where they come from when the model runs. torch and loramux.ops are imported when something is
measured, not before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

LAYERS = 30
SHAPES: dict[str, tuple[int, tuple[int, ...]]] = {
    "qkv": (576, (576, 192, 192)),
    "o": (576, (576,)),
    "gate_up": (576, (1536, 1536)),
    "down": (1536, (576,)),
}
HEAD = (576, 49152)
ROWS = (1, 16, 256)
RANK = 16


class Measured(NamedTuple):
    """Seconds of each run of one operation, and what it moved and computed."""

    name: str
    runs: list[float]
    weight_bytes: int
    flops: int

    def fields(self) -> dict[str, Any]:
        """Ready for JSON: the median in microseconds, GB/s of weights and GFLOP/s."""
        seconds = median(self.runs)
        return {
            "bench": self.name,
            "value": round(seconds * 1e6, 1),
            "unit": "us",
            "runs": [round(run * 1e6, 1) for run in self.runs],
            "gb_per_s": round(self.weight_bytes / seconds / 1e9, 1),
            "gflop_per_s": round(self.flops / seconds / 1e9, 1),
        }


def timed(call: Callable[[], object], runs: int, calls: int = 1) -> list[float]:
    """Seconds a call, `runs` times, after one call that is not counted."""
    call()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        seconds.append((time.perf_counter() - begin) / calls)
    return seconds


def machine(runs: int) -> Iterator[dict[str, Any]]:
    """What torch gets out of this machine: reading memory, and its best matrix product."""
    import torch

    block = torch.ones(64 << 20, dtype=torch.int64)
    yield limit("machine_read", "GB/s", block.numel() * 8, timed(block.sum, runs))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(1024, 1024).to(dtype)
        yield limit(f"machine_matmul_{name}", "GFLOP/s", 2 * 1024**3, timed(partial(torch.mm, a, a), runs))


def limit(name: str, unit: str, work: int, seconds: list[float]) -> dict[str, Any]:
    """`work` (bytes, operations) a run as billions a second."""
    rates = [round(work / s / 1e9, 1) for s in seconds]
    return {"bench": name, "value": median(rates), "unit": unit, "runs": rates}


def kernels(runs: int) -> Iterator[dict[str, Any]]:
    """Measure; one dictionary an operation and number of rows, ready for JSON. Raises ValueError without kernels."""
    import torch
    from loramux.ops.cpu.backend import NativeBackend
    from loramux.ops.cpu.build import Unavailable

    try:
        native = NativeBackend()
    except Unavailable as reason:
        raise ValueError(f"there are no native operations to measure: {reason}") from reason
    with torch.inference_mode():
        for name in SHAPES:
            yield from linear(native, name, runs)
        yield from head(native, runs)


def linear(native: Any, name: str, runs: int) -> Iterator[dict[str, Any]]:
    """One of the model's linear operations, with and without adapters."""
    import torch
    from loramux.ops.backend import LinearPart
    from loramux.ops.grouped import GroupedBackend
    from loramux.ops.nf4 import NF4Weight
    from loramux.ops.reference import ReferenceBackend

    k, widths = SHAPES[name]
    layers = [[LinearPart(NF4Weight.quantize(torch.randn(n, k) / k**0.5)) for n in widths] for _ in range(LAYERS)]
    linears = [native.prepare(layer, range(len(widths))) for layer in layers]
    for rows in ROWS:
        x = torch.randn(rows, k).to(torch.bfloat16)
        taken = timed(partial(run_all, linears, x, [native.bind(())] * LAYERS), runs, LAYERS)
        fields = Measured(f"{name}_m{rows}", taken, linears[0].nbytes, 2 * rows * k * sum(widths)).fields()
        for peer, backend in (("bitsandbytes", GroupedBackend()), ("reference", ReferenceBackend())):
            # One layer is enough of what takes ten times as long.
            others = timed(partial(backend.linear, x, layers[0], ()), min(runs, 3))
            fields[f"{peer}_us"] = round(median(others) * 1e6, 1)
        yield fields
        if rows > 1:
            yield with_adapters(native, name, linears, x, runs)


def head(native: Any, runs: int) -> Iterator[dict[str, Any]]:
    """The dense lm_head."""
    import torch

    k, n = HEAD
    weight = torch.randn(n, k).to(torch.bfloat16)
    operation = native.prepare_dense(weight, None)
    for rows in ROWS[:2]:
        x = torch.randn(rows, k).to(torch.bfloat16)
        taken = timed(partial(operation.run, x, native.bind(())), runs)
        plain = timed(partial(torch.mm, x, weight.T), min(runs, 3))
        fields = Measured(f"head_m{rows}", taken, weight.numel() * 2, 2 * rows * weight.numel()).fields()
        yield fields | {"torch_us": round(median(plain) * 1e6, 1)}


def run_all(linears: list[Any], x: Any, bound: list[Any]) -> None:
    """One pass over all copies of an operation."""
    for operation, segments in zip(linears, bound, strict=True):
        operation.run(x, segments)


def with_adapters(native: Any, name: str, linears: list[Any], x: Any, runs: int) -> dict[str, Any]:
    """The same with sixteen adapters of rank 16, the rows shared out evenly; every layer has factors of its own."""
    import torch
    from loramux.ops.segment import AdapterWeights, Segment

    k, widths = SHAPES[name]
    rows, sizes = x.shape[0], [RANK * k, *(n * RANK for n in widths)]
    step = rows // 16
    bound = []
    for _ in linears:
        segments = []
        for i in range(16):
            # A is shared by the parts of a call; B is not.
            offsets, at = [], sizes[0]
            for size in sizes[1:]:
                offsets.append([0, at, -1, -1])
                at += size
            weights = AdapterWeights(
                (torch.randn(at) * 0.01).to(torch.bfloat16),
                torch.tensor(offsets),
                torch.full((len(widths),), RANK, dtype=torch.int32),
                {},
            )
            segments.append(Segment(i * step, (i + 1) * step, 1.0, weights))
        bound.append(native.bind(tuple(segments)))
    taken = timed(partial(run_all, linears, x, bound), runs, len(linears))
    factors = sum(sizes) * 2 * 16
    flops = 2 * rows * (k * sum(widths) + len(widths) * RANK * k + RANK * sum(widths))
    return Measured(f"{name}_m{rows}_a16", taken, linears[0].nbytes + factors, flops).fields()

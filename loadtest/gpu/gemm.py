"""The NF4 linear operations alone, beside bitsandbytes' own 4-bit product and a dense one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]
from loramux.ops.backend import LinearPart
from loramux.ops.nf4 import NF4Weight
from loramux.ops.select import select_backend
from torch import Tensor
from torch.nn import functional as F

from loadtest.gpu.job import Job
from loadtest.gpu.random_model import RandomNF4
from loadtest.gpu.timing import each_took

BF16 = torch.bfloat16


@torch.inference_mode()
def gemm(job: Job) -> None:
    """A row for each operation of a layer and each number of rows; microseconds."""
    device = torch.device(job.scale.device)
    backend = select_backend(device, BF16)
    make = RandomNF4(device)
    job.report.note(
        f"Microseconds of one operation without adapters, {job.scale.steps.name} shapes, through a CUDA graph of all "
        f"its copies ({job.scale.gemm_bytes >> 20} MiB of NF4 or more, so that weights come from memory); * is one "
        f"that no graph could hold. Backend {backend.name}."
    )
    for name, (inputs, widths) in job.scale.steps.gemms.items():
        layer_bytes = sum(widths) * inputs // 2
        copies = max(2, -(-job.scale.gemm_bytes // layer_bytes))
        layers = [[make.weight(n, inputs) for n in widths] for _ in range(copies)]
        ours = [backend.prepare([LinearPart(w) for w in weights], range(len(widths))) for weights in layers]
        dense = [torch.randn(sum(widths), inputs, device=device).to(BF16) for _ in range(min(copies, 4))]
        floor = sum(w.nbytes for w in layers[0])
        for rows in job.scale.gemm_rows:
            x = torch.randn(rows, inputs, device=device).to(BF16)
            bound = backend.bind(())
            contestants: dict[str, list[Callable[[], object]]] = {
                "loramux": [partial(linear, x, bound) for linear in ours],
                "bitsandbytes": [partial(bitsandbytes_product, x, weights) for weights in layers],
                "dense bf16": [partial(F.linear, x, weight) for weight in dense],
            }
            with job.report.filling(operation=f"{name}, {inputs} → {'+'.join(map(str, widths))}", rows=rows) as row:
                spent = {who: timed(job, f"{name}, {rows} rows, {who}", calls) for who, calls in contestants.items()}
                for who, found in spent.items():
                    row[who] = found and (round(found[0], 1) if found[1] else f"{found[0]:.1f}*")
                if (our := spent["loramux"]) and (their := spent["bitsandbytes"]):
                    row["× bitsandbytes"] = round(their[0] / our[0], 2)
                if job.bandwidth:
                    row["floor"] = round(floor / job.bandwidth * 1e6, 1)


def timed(job: Job, what: str, calls: Sequence[Callable[[], Any]]) -> tuple[float, bool] | None:
    """See `each_took`; on a CPU there are no graphs, and none is missed."""
    device, scale = torch.device(job.scale.device), job.scale
    found = job.attempt(what, lambda: each_took(calls, device, warmups=scale.warmups, repeats=scale.repeats))
    return found and (found[0], found[1] or device.type == "cpu")


def bitsandbytes_product(x: Tensor, weights: Sequence[NF4Weight]) -> list[Tensor]:
    """x through each weight as bitsandbytes' Linear4bit computes it: `gemm_4bit`, one call a weight."""
    return [matmul_4bit(x, weight.codes.view(-1, 1), quant_state=weight.quant_state(x.dtype)) for weight in weights]

"""The NF4 linear operations alone, checked, beside bitsandbytes' own 4-bit product and a dense one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]
from loramux.ops.backend import LinearPart
from loramux.ops.nf4 import NF4Weight
from loramux.ops.select import select_backend
from torch import Tensor
from torch.nn import functional as F

from loadtest.gpu.random_model import RandomNF4
from loadtest.gpu.report import Job
from loadtest.gpu.timing import captured, took

BF16 = torch.bfloat16
MOST_ERROR = 2e-2  # of a product, its norm beside the right one's: bf16 inputs and outputs


@torch.inference_mode()
def gemm(job: Job) -> None:
    """A row for each operation of a layer and each number of rows; microseconds."""
    device = torch.device(job.scale.device)
    backend, make = select_backend(device, BF16), RandomNF4(device)
    job.report.note(
        f"Microseconds of one operation without adapters, {job.scale.steps.name} shapes, through a CUDA graph of all "
        f"its copies ({job.scale.gemm_bytes >> 20} MiB of NF4 or more, so that weights come from memory). "
        f"Error: beside a dequantized fp32 product. Backend {backend.name}."
    )
    for name, (inputs, widths) in job.scale.steps.gemms.items():
        copies = max(2, -(-job.scale.gemm_bytes // (sum(widths) * inputs // 2)))
        layers = [[make.weight(n, inputs) for n in widths] for _ in range(copies)]
        ours = [backend.prepare([LinearPart(w) for w in weights], range(len(widths))) for weights in layers]
        dense = [torch.randn(sum(widths), inputs, device=device).to(BF16) for _ in range(min(copies, 4))]
        floor = sum(w.nbytes for w in layers[0])
        for rows in job.scale.gemm_rows:
            x, bound = torch.randn(rows, inputs, device=device).to(BF16), backend.bind(())
            contestants: dict[str, list[Callable[[], object]]] = {
                "loramux": [partial(linear, x, bound) for linear in ours],
                "bitsandbytes": [partial(bitsandbytes_product, x, weights) for weights in layers],
                "dense bf16": [partial(F.linear, x, weight) for weight in dense],
            }
            what = f"{name}, {rows} rows"
            with job.report.filling(operation=f"{name}, {inputs} → {'+'.join(map(str, widths))}", rows=rows) as row:
                wrong = job.attempt(f"{what}, check", lambda: error(x, ours[0](x, bound), layers[0]))  # noqa: B023
                row["error"] = wrong
                if wrong is not None and not wrong < MOST_ERROR:
                    job.report.problem(f"{what}: wrong, error {wrong:.3g}")
                for who, calls in contestants.items():
                    row[who] = job.attempt(f"{what}, {who}", partial(each_took, job, calls))
                if row["loramux"] and row["bitsandbytes"]:
                    row["× bitsandbytes"] = round(row["bitsandbytes"] / row["loramux"], 2)
                if job.bandwidth:
                    row["floor"] = floor / job.bandwidth * 1e6


def each_took(job: Job, calls: Sequence[Callable[[], object]]) -> float:
    """Median device microseconds of one of `calls`, run one after another, on a GPU in a graph."""
    device, scale = torch.device(job.scale.device), job.scale

    def run() -> None:
        for call in calls:
            call()

    run()
    timed = captured(run) if device.type == "cuda" else run
    return took(timed, device, warmups=scale.warmups, repeats=scale.repeats, seconds=0.2).device_ms * 1e3 / len(calls)


def bitsandbytes_product(x: Tensor, weights: Sequence[NF4Weight]) -> list[Tensor]:
    """x through each weight as bitsandbytes' Linear4bit computes it: `gemm_4bit`, one call a weight."""
    return [matmul_4bit(x, weight.codes.view(-1, 1), quant_state=weight.quant_state(x.dtype)) for weight in weights]


def error(x: Tensor, products: Sequence[Tensor], weights: Sequence[NF4Weight]) -> float:
    """The norm of what `products` differ by from x·Wᵀ in fp32, beside its own; not finite if they are not."""
    right = torch.cat([x.float() @ weight.dequantize(torch.float32).T for weight in weights], dim=1)
    return float((torch.cat(list(products), dim=1).float() - right).norm() / right.norm())

"""What the device does at most; the kernels, compiled before they are needed; and linear operations alone."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata

import torch
from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]
from loramux.model.graphs import CudaRecorder
from loramux.ops.backend import LinearPart
from loramux.ops.cuda import precompile as ahead
from loramux.ops.cuda.linear import can_overlap
from loramux.ops.nf4 import NF4Weight
from loramux.ops.select import select_backend
from torch import Tensor
from torch.nn import functional as F

from loadtest.gpu.models import milliseconds
from loadtest.gpu.report import Job

BF16 = torch.bfloat16
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes")


def machine(job: Job) -> None:
    """One row; its `device`, versions and `GB/s` are read by the other parts and the document."""
    device, size, cuda = torch.device(job.scale.device), job.scale.matmul, job.scale.device == "cuda"
    with job.row(device=torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}), dry run") as row:
        row |= {package.name: package.version for package in metadata.distributions() if package.name in PACKAGES}
        row["python"] = platform.python_version()
        source = torch.randint(0, 256, (job.scale.copy_bytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        row["GB/s"] = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6
        a, b = (torch.randn(size, size, device=device, dtype=BF16) for _ in range(2))
        row["bf16 TFLOP/s"] = 2 * size**3 / milliseconds(lambda: a @ b) / 1e9
        if cuda:
            row["GiB"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
            command = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
            status, driver = subprocess.getstatusoutput(command)  # noqa: S605
            row["driver"] = "?" if status else driver
    job.tell(
        note=f"GB/s: a copy of {job.scale.copy_bytes / 2**30:.3g} GiB, bytes read plus bytes written; TFLOP/s: a "
        f"product of two random bf16 matrices of {size} by {size}."
    )


def compile_kernels(job: Job) -> None:
    """A row for each kernel of the measured model, compiled into the cache by the server's own code, in parallel
    processes; in a dry run, of some of them, for a card that is not there."""
    dry = job.scale.device == "cpu"
    shapes = replace(shapes_of(job), overlap=can_overlap(torch.device(job.scale.device)))
    wanted = ahead.Steps((8,), (0,), (False,)) if dry else ahead.steps(max(job.scale.mixed_ranks), invariant=False)
    major, minor = (9, 0) if dry else torch.cuda.get_device_capability()
    begin, processes = time.monotonic(), os.cpu_count() or 1
    made = ahead.precompile(shapes, wanted, 10 * major + minor, processes=processes, resources=True)
    for kernel in sorted({compiled.kernel for compiled in made}):
        of = [compiled for compiled in made if compiled.kernel == kernel]
        most = {what: max(getattr(one, what) for one in of) for what in ("registers", "spilled", "shared")}
        job.tell(row={"kernel": kernel, "variants": len(of), "seconds in all": sum(one.seconds for one in of), **most})
    seconds = time.monotonic() - begin
    job.tell(note=f"{seconds:.0f} s on the clock. Registers, bytes spilled, bytes of shared memory.")


def shapes_of(job: Job) -> ahead.Shapes:
    """Of the measured model: what its kernels depend on."""
    model = job.scale.model
    heads = model["num_attention_heads"], model["num_key_value_heads"], model["head_dim"]
    return ahead.Shapes.llama(model["hidden_size"], model["intermediate_size"], *heads, model["vocab_size"])


@torch.inference_mode()
def gemm(job: Job) -> None:
    """A row for each operation of a layer, number of rows and who computes it; what the smoke checks is only timed."""
    device, least = torch.device(job.scale.device), job.scale.gemm_bytes
    backend = select_backend(device, BF16)
    job.tell(
        note="Microseconds of one operation without adapters, through a CUDA graph of all its copies "
        f"({least >> 20} MiB of NF4 or more, so that weights come from memory). Backend {backend.name}."
    )
    for name, (k, widths, *_) in zip(("q/k/v", "o", "gate/up", "down"), shapes_of(job).operations, strict=True):
        copies = max(2, -(-least // (sum(widths) * k // 2)))
        layers = [[NF4Weight.quantize(torch.randn(n, k, device=device)) for n in widths] for _ in range(copies)]
        ours = [backend.prepare([LinearPart(w) for w in weights], range(len(widths))) for weights in layers]
        dense = [torch.randn(sum(widths), k, device=device, dtype=BF16) for _ in range(min(copies, 4))]
        for rows in job.scale.gemm_rows:
            x, bound = torch.randn(rows, k, device=device, dtype=BF16), backend.bind(())
            contestants: dict[str, list[Callable[[], object]]] = {
                "loramux": [partial(linear, x, bound) for linear in ours],
                "bitsandbytes": [partial(bitsandbytes_product, x, weights) for weights in layers],
                "dense bf16": [partial(F.linear, x, weight) for weight in dense],
            }
            took: dict[str, float] = {}
            for who, calls in contestants.items():
                with job.row(operation=f"{name}, {k} → {'+'.join(map(str, widths))}", rows=rows, by=who) as row:
                    row["floor"] = sum(weight.nbytes for weight in layers[0]) / job.bandwidth / 1e3
                    row["µs"] = took[who] = microseconds(calls, device)
                    row["× loramux"] = took[who] / took["loramux"] if "loramux" in took else None


def microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Of one of `calls`, run one after another, on a GPU in a graph."""

    def run() -> None:
        for call in calls:
            call()

    run()
    timed = CudaRecorder(device).record(run) if device.type == "cuda" else run
    return milliseconds(timed) * 1e3 / len(calls)


def bitsandbytes_product(x: Tensor, weights: Sequence[NF4Weight]) -> list[Tensor]:
    """x through each weight as bitsandbytes' Linear4bit computes it: `gemm_4bit`, one call a weight."""
    return [matmul_4bit(x, weight.codes.view(-1, 1), quant_state=weight.quant_state(x.dtype)) for weight in weights]

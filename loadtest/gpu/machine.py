"""The device and what it can do at most; the kernels' compilation; the linear operations alone, beside their peers."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import Any

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


def machine(job: Job) -> None:
    """One row; its `device`, versions and `GB/s` are read by the other parts and the document."""
    device = torch.device(job.scale.device)
    with job.report.filling(device=device_name(device), driver=driver(), torch=torch.__version__) as row:
        row |= {package: version(package) for package in ("triton", "transformers", "bitsandbytes")}
        row["python"] = platform.python_version()
        row["GB/s"] = job.attempt("copy", partial(bandwidth, job, device))
        row["bf16 TFLOP/s"] = job.attempt("matmul", partial(matmul_rate, job, device))
        if device.type == "cuda":
            row["GiB"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    job.report.note(
        f"GB/s: a copy of {job.scale.copy_bytes / 2**30:.3g} GiB, bytes read plus bytes written; TFLOP/s: a product of "
        f"two random bf16 matrices of {job.scale.matmul} by {job.scale.matmul}."
    )


def device_name(device: torch.device) -> str:
    """As the driver calls it; of a CPU, what its architecture is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()}), dry run"


def driver() -> str:
    """The driver's version, or "?" where nvidia-smi cannot say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True, timeout=20).splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "?"


def version(package: str) -> str:
    """Of a distribution; "none" if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def bandwidth(job: Job, device: torch.device) -> float:
    """GB/s, read and written, of a copy of random bytes."""
    source = torch.randint(0, 256, (job.scale.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = took(lambda: target.copy_(source), device, warmups=job.scale.warmups, repeats=job.scale.repeats)
    return 2 * source.numel() / spent.device_ms / 1e6


def matmul_rate(job: Job, device: torch.device) -> float:
    """TFLOP/s of a large bf16 product."""
    size = job.scale.matmul
    a, b = (torch.randn(size, size, device=device).to(BF16) for _ in range(2))
    spent = took(lambda: a @ b, device, warmups=job.scale.warmups, repeats=job.scale.repeats)
    return 2 * size**3 / spent.device_ms / 1e9


def compile_kernels(job: Job) -> None:
    """Rows of what is compiled into the cache before it is needed, by the server's own code, in parallel processes."""
    made: list[Any] = []
    begin = time.monotonic()
    try:
        job.attempt("compiling", partial(precompile, job, made.append))
    finally:
        for kernel in sorted({line.kernel for line in made}):
            of = [line for line in made if line.kernel == kernel]
            most = {what: max(getattr(line, what) for line in of) for what in ("registers", "spilled", "shared")}
            seconds = sum(line.seconds for line in of)
            job.report.row({"kernel": kernel, "variants": len(of), "seconds in all": seconds, **most})
        seconds = time.monotonic() - begin
        job.report.note(f"{seconds:.0f} s on the clock. Registers, bytes spilled, bytes of shared memory.")


def precompile(job: Job, tell: Callable[[Any], None]) -> None:
    """What steps of the measured model launch; in a dry run, some of it, for a card that is not there."""
    from loramux.ops.cuda import precompile as ahead

    decoder, dry = job.scale.steps, job.scale.device == "cpu"
    heads = decoder.heads, decoder.kv_heads, decoder.head_dim
    shapes = ahead.Shapes.llama(decoder.hidden, decoder.inner, *heads, decoder.vocab)
    wanted = ahead.Steps((8,), (0,), (False,)) if dry else ahead.steps(max(job.scale.mixed_ranks), invariant=False)
    major, minor = (9, 0) if dry else torch.cuda.get_device_capability()
    processes = os.cpu_count() or 1
    ahead.precompile(shapes, wanted, 10 * major + minor, processes=processes, resources=True, tell=tell)


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

"""The device and what it can do at most; and the kernels, compiled before they are needed."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import torch

from loadtest.gpu.report import Job
from loadtest.gpu.timing import took

BF16 = torch.bfloat16


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
    from loramux.ops.cuda.linear import can_overlap

    decoder, dry = job.scale.steps, job.scale.device == "cpu"
    heads = decoder.heads, decoder.kv_heads, decoder.head_dim
    shapes = ahead.Shapes.llama(decoder.hidden, decoder.inner, *heads, decoder.vocab)
    shapes = replace(shapes, overlap=can_overlap(torch.device(job.scale.device)))
    wanted = ahead.Steps((8,), (0,), (False,)) if dry else ahead.steps(max(job.scale.mixed_ranks), invariant=False)
    major, minor = (9, 0) if dry else torch.cuda.get_device_capability()
    processes = os.cpu_count() or 1
    ahead.precompile(shapes, wanted, 10 * major + minor, processes=processes, resources=True, tell=tell)

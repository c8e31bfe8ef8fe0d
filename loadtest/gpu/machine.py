"""The device, the versions around it, and what it can do at most."""

from __future__ import annotations

import platform
import re
import subprocess
import tomllib
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from loadtest.gpu.job import Job
from loadtest.gpu.timing import took

ROOT = Path(__file__).parents[2]


def machine(job: Job) -> None:
    """One row; its columns are read by the command (`device`, `driver`, `torch`, `triton`, `GB/s`)."""
    device = torch.device(job.scale.device)
    with job.report.filling(device=device_name(device), driver=driver(device), torch=torch.__version__) as row:
        row["triton"], row["transformers"], row["bitsandbytes"] = map(
            version, ("triton", "transformers", "bitsandbytes")
        )
        row["GB/s"] = job.attempt("copy", partial(bandwidth, job, device))
        row["bf16 TFLOP/s"] = job.attempt("matmul", partial(matmul_rate, job, device))
        if device.type == "cuda":
            row["GiB"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    job.report.note(
        "GB/s: a copy larger than any cache, bytes read plus bytes written; TFLOP/s: a product of two bf16 matrices "
        f"of {job.scale.matmul} by {job.scale.matmul}."
    )
    if missing := missing_packages():
        job.report.note(f"Not installed here: {', '.join(missing)}; parts that need them fail and say so.")


def device_name(device: torch.device) -> str:
    """As the driver calls it; of a CPU, what its architecture is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()}), dry run"


def driver(device: torch.device) -> str:
    """The driver's version, or "?" where nvidia-smi cannot say."""
    if device.type != "cuda":
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "?"
    return done.stdout.split("\n", 1)[0].strip() or "?"


def version(package: str) -> str:
    """Of a distribution; "none" if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def missing_packages() -> list[str]:
    """Distributions that the server and its tests ask for and that this Python does not have, of any version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = [re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in asked]
    return [name for name in names if version(name) == "none"]


def bandwidth(job: Job, device: torch.device) -> float:
    """GB/s, read and written, of a copy of random bytes."""
    source = torch.randint(0, 256, (job.scale.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = took(lambda: target.copy_(source), device, warmups=job.scale.warmups, repeats=job.scale.repeats)
    return 2 * source.numel() / spent.device_ms / 1e6


def matmul_rate(job: Job, device: torch.device) -> float:
    """TFLOP/s of a large bf16 product."""
    size = job.scale.matmul
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    spent = took(lambda: a @ b, device, warmups=job.scale.warmups, repeats=job.scale.repeats)
    return 2 * size**3 / spent.device_ms / 1e9

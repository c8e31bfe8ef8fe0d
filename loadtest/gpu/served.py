"""Real servers over gRPC: whether a mixed batch answers as each request alone does, and tokens a second."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loramux.client import AsyncClient

from loadtest.adapters import write_adapters
from loadtest.bench import BenchSpec, bench
from loadtest.commands.options import connect
from loadtest.gpu.job import Job
from loadtest.gpu.report import Row
from loadtest.gpu.small_model import write_model
from loadtest.server_process import ServerAddress, serve
from loadtest.shapes import linear_shapes, read_config
from loadtest.workload import WorkloadSpec, plan

FLAG = "--batch-invariant"
QUESTIONS = 16
START_TIMEOUT = 120.0


def served(job: Job) -> None:
    """A random model of a small real shape."""
    with tempfile.TemporaryDirectory(prefix="loramux-gpu-check-") as scratch:
        folder = Path(scratch)
        model = job.attempt(
            "writing a model", partial(write_model, job.scale.served, folder / "model", job.scale.device)
        )
        if model is not None:
            both_modes(job, job.scale.served.name, str(model), job.scale.served.config(), folder)


def smollm2(job: Job) -> None:
    """The embedded model, where an earlier start has fetched it: this machine may have no network."""
    root = Path(os.environ.get("LORAMUX_CACHE") or Path.home() / ".cache" / "loramux")
    if not any(root.glob("models/smollm2-*/config.json")):
        job.report.note(f"SmolLM2-135M was not served: its files are not under {root}.")
        return
    with tempfile.TemporaryDirectory(prefix="loramux-gpu-check-") as scratch:
        both_modes(job, "SmolLM2-135M", "smollm2", read_config("smollm2"), Path(scratch))


def both_modes(job: Job, title: str, model: str, config: Mapping[str, Any], folder: Path) -> None:
    """A server with the flag that promises equal answers, if there is one, and one without it, which is timed."""
    root = folder / "adapters"
    names = job.attempt("writing adapters", partial(write_names, job, config, root))
    if names is None:
        return
    arguments = ["--model", model, "--device", job.scale.device, "--adapter-dir", str(root), "--max-context", "1024"]
    arguments += ["--adapter-memory", "4GiB", "--log-level", "warning"]
    if job.scale.device == "cpu":
        # There is no flag to give: on a CPU every backend in bf16 promises it.
        one_server(job, title, arguments, names, folder, promised=True)
        return
    one_server(job, title, arguments, names, folder, promised=False)
    if has_flag():
        one_server(job, f"{title}, {FLAG}", [*arguments, FLAG], names, folder, promised=True)
    else:
        job.report.problem(f"{title}: `loramux serve` has no {FLAG}, so nothing promises that a batch answers as one "
                           "request alone does")  # fmt: skip


def write_names(job: Job, config: Mapping[str, Any], root: Path) -> list[str]:
    """Random adapters of mixed ranks; their names."""
    folders = write_adapters(root, linear_shapes(config), count=job.scale.served_adapters, ranks=job.scale.mixed_ranks)
    return [path.name for path in folders]


def has_flag() -> bool:
    """Whether this build's server knows the flag."""
    command = [sys.executable, "-m", "loramux.cli", "serve", "--help"]
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=wide)
    return FLAG in done.stdout


def one_server(
    job: Job, title: str, arguments: Sequence[str], names: Sequence[str], folder: Path, *, promised: bool
) -> None:
    """A row: how many answers of a mixed batch were those of the same requests alone, and output tokens a second."""

    def run(row: Row) -> None:
        with serve(arguments, folder, start_timeout=min(START_TIMEOUT, max(10.0, job.left))) as address:
            equal = job.attempt(f"{title}: answers", lambda: asyncio.run(equal_answers(job, address, names)))
            if equal is not None:
                row["answers as alone"] = f"{equal} of {QUESTIONS}"
                if promised and equal < QUESTIONS:
                    job.report.problem(f"{title}: {QUESTIONS - equal} of {QUESTIONS} answers differ in a mixed batch")
            for requests in job.scale.served_requests:
                for many in (0, len(names)) if requests > 1 else (0,):
                    column = f"{requests} requests, {f'{many} adapters' if many else 'base'}"
                    spec = workload(job, requests, names[:many])
                    row[column] = job.attempt(f"{title}: {column}", partial(timed, address, spec))

    with job.report.filling(served=title) as row:
        job.attempt(f"{title}: the server", partial(run, row))


async def equal_answers(job: Job, address: ServerAddress, names: Sequence[str]) -> int:
    """How many of QUESTIONS greedy requests, of the base and of adapters in turn, give the same ids alone as all at
    once. Each mode has a salt of its own: none finds the other's keys in the prefix cache."""
    async with AsyncClient(address.target, timeout=max(1.0, job.left)) as client:
        vocab = (await client.model()).vocab_size
        prompts = plan(WorkloadSpec(QUESTIONS, 60, 1, vocab, ("", *names), seed=5))

        async def ask(index: int, salt: str) -> tuple[int, ...]:
            request = prompts[index]
            result = await client.generate(
                token_ids=request.prompt_ids[: 5 + 3 * index],
                adapter=request.adapter,
                max_new_tokens=job.scale.served_tokens // 2,
                temperature=0.0,
                ignore_eos=True,
                cache_salt=salt,
            )
            return result.completions[0].token_ids

        together = await asyncio.gather(*(ask(i, "together") for i in range(QUESTIONS)))
        alone = [await ask(i, "alone") for i in range(QUESTIONS)]
    return sum(a == b for a, b in zip(together, alone, strict=True))


def workload(job: Job, requests: int, names: Sequence[str]) -> BenchSpec:
    """Twice as many requests as run at once."""
    tokens = job.scale.served_tokens
    spec = WorkloadSpec(2 * requests, tokens, tokens, job.scale.served.vocab, tuple(names), seed=requests + len(names))
    return BenchSpec(spec, requests, warmup=requests)


def timed(address: ServerAddress, spec: BenchSpec) -> float:
    """See `rate`."""
    return asyncio.run(rate(address, spec))


async def rate(address: ServerAddress, spec: BenchSpec) -> float:
    """Output tokens a second. Raises ValueError if a request failed."""
    async with connect(address.target, address.admin) as target:
        summary = await bench(target, spec)
    if summary["failed"]:
        raise ValueError(f"{summary['failed']} requests failed: {summary['errors']}")
    return float(summary["output_throughput"])

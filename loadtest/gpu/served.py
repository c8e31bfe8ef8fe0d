"""Real servers over gRPC: whether a mixed batch answers as each request alone does, and tokens a second."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from loramux.client import AsyncClient

from loadtest.adapters import write_adapters
from loadtest.cells import Cell
from loadtest.commands.bench import one_run
from loadtest.commands.options import connect
from loadtest.gpu.models import random_model
from loadtest.gpu.report import Job
from loadtest.server_process import ServerAddress, serve
from loadtest.shapes import linear_shapes
from loadtest.workload import PlannedRequest, WorkloadSpec, plan

FLAG = "--batch-invariant"  # promises equal answers
ADAPTERS, QUESTIONS = 16, 16


def served(job: Job) -> None:
    """Of a random model of few layers, with the flag and without it: its answers, and the cells of `make bench`."""
    config, device = job.scale.served, job.scale.device
    with tempfile.TemporaryDirectory(prefix="loramux-gpu-check-") as scratch:
        folder, root = Path(scratch), Path(scratch) / "adapters"
        random_model(config, device).save_pretrained(folder / "model")
        written = write_adapters(root, linear_shapes(config), count=ADAPTERS, ranks=job.scale.mixed_ranks)
        names, seconds = tuple(path.name for path in written), job.seconds
        arguments = ["--model", str(folder / "model"), "--device", device, "--adapter-dir", str(root)]
        arguments += ["--max-context", "1024", "--adapter-memory", "4GiB", "--log-level", "warning"]
        for flags in ([FLAG],) if device == "cpu" else ([FLAG], []):
            title, begin = " ".join(["loramux serve", *flags]), time.monotonic()
            with (
                job.row(what=title, measured="start, s") as row,
                serve([*arguments, *flags], folder, start_timeout=seconds) as address,
            ):
                row["found"] = time.monotonic() - begin
                with job.row(what=title, measured="answers as alone") as row:
                    equal = asyncio.run(equal_answers(address.target, config["vocab_size"], names, seconds))
                    row["found"] = f"{equal} of {QUESTIONS}"
                    if flags and equal < QUESTIONS:
                        raise ValueError("answers differ in a mixed batch")
                for cell in job.scale.cells:
                    with job.row(what=title, measured=f"{cell.name}, {cell.unit}") as row:
                        row["found"] = asyncio.run(rate(address, cell, config["vocab_size"], names))


async def rate(address: ServerAddress, cell: Cell, vocab_size: int, names: tuple[str, ...]) -> float:
    """What the cell counts, of one run. Raises ValueError if a request failed."""
    async with connect(address.target, address.admin) as target:
        return await one_run(target, cell, vocab_size, names, seed=0)


async def equal_answers(target: str, vocab_size: int, names: Sequence[str], seconds: float) -> int:
    """How many of QUESTIONS greedy requests, of the base and of adapters in turn, give the same ids alone as all at
    once. Each mode has a salt of its own: none finds the other's keys in the prefix cache."""
    questions = plan(WorkloadSpec(QUESTIONS, 60, 32, vocab_size, ("", *names), seed=5))
    async with AsyncClient(target, timeout=seconds) as client:

        async def ask(request: PlannedRequest, salt: str) -> tuple[int, ...]:
            ids = request.prompt_ids[: 5 + 3 * request.index]
            result = await client.generate(
                token_ids=ids, adapter=request.adapter, max_new_tokens=request.output_len, temperature=0.0,
                ignore_eos=True, cache_salt=salt,
            )  # fmt: skip
            return result.completions[0].token_ids

        together = await asyncio.gather(*(ask(request, "together") for request in questions))
        alone = [await ask(request, "alone") for request in questions]
    return sum(a == b for a, b in zip(together, alone, strict=True))

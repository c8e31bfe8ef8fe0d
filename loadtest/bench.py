"""One benchmark run: find the adapters, plan, warm up, drive, summarize. Prints nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.adapters import CONFIG_FILE
from loadtest.driver import DriveResult, StreamOpener, drive
from loadtest.report import RequestRecord, summarize
from loadtest.target import Target
from loadtest.workload import PlannedRequest, WorkloadSpec, plan, warmup

LOADS_AT_ONCE = 4


class NotEnoughAdapters(Exception):
    """The server has fewer adapters than the run needs."""


@dataclass(frozen=True, slots=True)
class BenchSpec:
    """A run against a server. `concurrency` None is an open loop at `workload.request_rate`."""

    workload: WorkloadSpec
    concurrency: int | None = 16
    ignore_eos: bool = True
    temperature: float = 0.0
    warmup: int = 0


async def bench(
    target: Target,
    spec: BenchSpec,
    *,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> dict[str, Any]:
    """Run and return the summary, ready for JSON. Raises what the client raises when there is no server."""
    workload = spec.workload
    stream = opener(target, spec)
    if spec.warmup:
        await drive(stream, plan(warmup(workload, spec.warmup)), concurrency=spec.concurrency or LOADS_AT_ONCE)
    result = await drive(
        stream,
        plan(workload),
        concurrency=spec.concurrency,
        exact_output=spec.ignore_eos,
        on_done=on_done,
    )
    return bench_fields(spec, result)


def bench_fields(spec: BenchSpec, result: DriveResult) -> dict[str, Any]:
    """Return the summary of a run together with what was asked for and how the driver itself fared."""
    return {
        **summarize(result.records, result.duration),
        "max_concurrency": spec.concurrency,
        "request_rate": spec.workload.request_rate or "inf",
        "burstiness": spec.workload.burstiness,
        "num_prompts": spec.workload.num_prompts,
        "prompt_len": spec.workload.prompt_len,
        "output_len": spec.workload.output_len,
        "adapters": len(spec.workload.adapters),
        "spread": spec.workload.spread,
        "seed": spec.workload.seed,
        "driver_lag_ms_p99": result.lag_ms_p99,
        "driver_cpu_fraction": result.cpu_fraction,
    }


def opener(target: Target, spec: BenchSpec) -> StreamOpener:
    """Return how the driver sends a request to this target."""

    async def open_stream(request: PlannedRequest) -> AsyncIterator[int]:
        async for event in target.stream(
            request.prompt_ids,
            request.adapter,
            request.output_len,
            temperature=spec.temperature,
            ignore_eos=spec.ignore_eos,
            seed=spec.workload.seed + request.index,
        ):
            yield event.tokens

    return open_stream


def adapter_folders(folder: Path) -> list[Path]:
    """Return the adapter folders directly under `folder`, resolved, by name.

    Raises FileNotFoundError if there is none.
    """
    found = sorted(file.parent.resolve() for file in folder.glob(f"*/{CONFIG_FILE}"))
    if not found:
        raise FileNotFoundError(f"no adapters under {folder}; `python -m loadtest adapters --out {folder}` makes some")
    return found


async def load_folders(
    target: Target, folders: Sequence[Path], on_loaded: Callable[[], None] = lambda: None
) -> list[str]:
    """Load adapter folders (absolute paths) under their own names, a few at a time, and return the names.

    Other content under the same name is replaced. Raises what the client raises for the first that fails.
    """
    limit = asyncio.Semaphore(LOADS_AT_ONCE)

    async def load(folder: Path) -> None:
        async with limit:
            await target.load(folder.name, str(folder))
        on_loaded()

    await asyncio.gather(*(load(folder) for folder in folders))
    return [folder.name for folder in folders]


async def choose_adapters(target: Target, count: int, prefix: str) -> list[str]:
    """Return the first `count` names, in order, of the adapters that are ready and start with `prefix`.

    Raises NotEnoughAdapters when there are fewer.
    """
    if count == 0:
        return []
    found = await target.adapters()
    names = sorted(a.name for a in found.adapters if a.state == "ready" and a.name.startswith(prefix))
    if len(names) < count:
        raise NotEnoughAdapters(
            f"{count} adapters are asked for, but the server has {len(names)} that start with {prefix!r}; "
            "--load-dir DIR loads those that `python -m loadtest adapters --out DIR` made"
        )
    return names[:count]

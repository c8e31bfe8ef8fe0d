"""One run of a server that knows many adapters and has memory for few: speed, failures, and what its tiers did.

Prints nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loadtest.bench import BenchSpec, bench, opener
from loadtest.driver import drive
from loadtest.target import Target
from loadtest.tier_counts import TierCounts
from loadtest.watch import fetch_page
from loadtest.workload import WARMUP_OUTPUT_LEN, Spread, WorkloadSpec, plan

CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class Popularity:
    """How traffic spreads over so many registered adapters; the first are the most popular."""

    adapters: int
    spread: Spread

    @property
    def name(self) -> str:
        """E.g. "registered_2000_zipf"."""
        return f"registered_{self.adapters}_{self.spread}"

    def workload(self, vocab_size: int, names: Sequence[str], requests: int, seed: int) -> WorkloadSpec:
        """64 + 64 tokens. Another seed, or another popularity, gives other prompts: no prefix cache helps."""
        return WorkloadSpec(
            requests,
            64,
            64,
            vocab_size,
            tuple(names[: self.adapters]),
            spread=self.spread,
            seed=zlib.crc32(f"{self.name} {seed}".encode()),
        )


async def registered_run(target: Target, metrics: str, workload: WorkloadSpec, warmup: int) -> dict[str, Any]:
    """Drive a workload, CONCURRENCY at once, and return its summary with the tiers' fields.

    Before, `warmup` brief requests of the same popularity, so that memory holds what such traffic leaves there.
    `metrics` is the URL of the server's page. Failures of requests are counted, never raised.
    """
    spec = BenchSpec(workload, CONCURRENCY)
    before_it = replace(workload, num_prompts=warmup, output_len=WARMUP_OUTPUT_LEN, seed=workload.seed + 1_000_003)
    await drive(opener(target, spec), plan(before_it), concurrency=CONCURRENCY)
    before = TierCounts.of_page(await fetch_page(metrics))
    summary = await bench(target, spec)
    after = TierCounts.of_page(await fetch_page(metrics))
    return summary | after.since(before).fields()

"""The served workloads that `make bench` measures: one name each, the same on every machine.

Knows no server.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

from loadtest.workload import WorkloadSpec


@dataclass(frozen=True, slots=True)
class Cell:
    """`concurrency` requests at a time, `rounds` times as many in all, over `adapters` adapters (0: the base)."""

    name: str
    concurrency: int
    adapters: int
    prompt_len: int = 64
    output_len: int = 64
    rounds: int = 4
    counts_prompt: bool = False

    @property
    def unit(self) -> str:
        """What `rate` counts."""
        return "prompt tokens/s" if self.counts_prompt else "output tokens/s"

    def workload(self, vocab_size: int, names: tuple[str, ...], seed: int) -> WorkloadSpec:
        """The requests of one run. Another seed, and another cell, gives other prompts: no prefix cache helps."""
        return WorkloadSpec(
            self.concurrency * self.rounds,
            self.prompt_len,
            self.output_len,
            vocab_size,
            names[: self.adapters],
            seed=zlib.crc32(f"{self.name} {seed}".encode()),
        )

    def rate(self, summary: dict[str, Any]) -> float:
        """Tokens per second of a finished run."""
        counted = summary["total_input_tokens"] if self.counts_prompt else summary["total_output_tokens"]
        return float(counted) / float(summary["duration"])


CELLS = (
    Cell("serve_c1_base", 1, 0),
    Cell("serve_c16_base", 16, 0),
    Cell("serve_c16_a1", 16, 1),
    Cell("serve_c16_a16", 16, 16),
    Cell("serve_c32_a16", 32, 16, rounds=2),
    Cell("prefill_base", 16, 0, prompt_len=512, output_len=1, rounds=1, counts_prompt=True),
    Cell("prefill_a16", 16, 16, prompt_len=512, output_len=1, rounds=1, counts_prompt=True),
)

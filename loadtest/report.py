"""From what was observed to what is reported: pure functions, in the units and field names of `vllm bench
serve`.

Definitions, as there:
- TTFT: from sending (open loop: from the planned arrival) to the first message that carries a token.
- TPOT: (last token's time − first token's time) / (output tokens − 1), one value a request, of ≥ 2 tokens.
- ITL: the time between two messages of a stream. A message that carries several tokens (a coalesced delta)
  counts once, with its whole gap, because that gap is what its reader waited; `tokens_per_delta` shows how
  often that was so.
- E2EL: from sending to the end of the stream.
Percentiles interpolate linearly, deviations are of the population, and only completed requests enter any of
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

PERCENTILES = (90, 99)
LATENCIES = {"ttft": "first token", "tpot": "per token", "itl": "between tokens", "e2el": "whole answer"}


@dataclass(slots=True)
class RequestRecord:
    """What the driver saw of one request. All times are seconds on one monotonic clock.

    `deltas` holds (time, tokens) of every message that carried tokens. `error` is "" for a completed
    request, else a gRPC status name or a word of the driver's own.
    """

    adapter: str
    prompt_tokens: int
    start: float
    deltas: list[tuple[float, int]] = field(default_factory=list)
    end: float = 0.0
    error: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens received."""
        return sum(tokens for _, tokens in self.deltas)

    @property
    def ttft(self) -> float:
        """Seconds to the first token; needs at least one delta."""
        return self.deltas[0][0] - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for fewer than two tokens."""
        tokens = self.output_tokens
        return (self.deltas[-1][0] - self.deltas[0][0]) / (tokens - 1) if tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between messages that carried tokens."""
        return [later[0] - earlier[0] for earlier, later in zip(self.deltas, self.deltas[1:], strict=False)]


def summarize(records: Sequence[RequestRecord], duration: float) -> dict[str, Any]:
    """Return throughput and latency of a run that took `duration` seconds, ready for JSON."""
    done = [record for record in records if not record.error]
    tokens_in = sum(record.prompt_tokens for record in done)
    tokens_out = sum(record.output_tokens for record in done)
    messages = sum(len(record.deltas) for record in done)
    span = max(duration, 1e-9)
    summary: dict[str, Any] = {
        "completed": len(done),
        "failed": len(records) - len(done),
        "errors": dict(Counter(record.error for record in records if record.error)),
        "distinct_adapters": len({record.adapter for record in done if record.adapter}),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "duration": duration,
        "request_throughput": len(done) / span,
        "output_throughput": tokens_out / span,
        "total_token_throughput": (tokens_in + tokens_out) / span,
        "tokens_per_delta": tokens_out / messages if messages else 0.0,
    }
    summary |= latency_fields("ttft", (record.ttft for record in done))
    summary |= latency_fields("tpot", (record.tpot for record in done if record.tpot is not None))
    summary |= latency_fields("itl", (gap for record in done for gap in record.gaps))
    summary |= latency_fields("e2el", (record.end - record.start for record in done))
    return summary


def latency_fields(name: str, seconds: Iterable[float]) -> dict[str, float]:
    """Return mean, median, std and percentiles in milliseconds; zeros when there is nothing to measure."""
    values = np.fromiter(seconds, np.float64) * 1000.0
    if not values.size:
        values = np.zeros(1)
    fields = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    return fields | {f"p{p}_{name}_ms": float(np.percentile(values, p)) for p in PERCENTILES}


def percentile(values: Sequence[float], p: float) -> float:
    """Return the p-th percentile, 0.0 of nothing."""
    return float(np.percentile(values, p)) if len(values) else 0.0


def rounded(summary: Mapping[str, Any], digits: int = 4) -> dict[str, Any]:
    """Return a copy whose floats are short enough to read in one line."""
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in summary.items()}


def latency_table(summary: Mapping[str, Any]) -> Table:
    """Return the latencies of a summary as a table, in milliseconds."""
    table = Table(title="latency, ms", title_justify="left")
    table.add_column("")
    columns = ["mean", "median", *(f"p{p}" for p in PERCENTILES), "std"]
    for column in columns:
        table.add_column(column, justify="right")
    for name, title in LATENCIES.items():
        table.add_row(title, *(f"{summary[f'{column}_{name}_ms']:,.2f}" for column in columns))
    return table


def throughput_table(summary: Mapping[str, Any]) -> Table:
    """Return the counts and rates of a summary as a table."""
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("completed / failed", f"{summary['completed']} / {summary['failed']}")
    for status, count in sorted(summary["errors"].items()):
        table.add_row(f"  failed with {status}", str(count), style="red")
    table.add_row("distinct adapters", str(summary["distinct_adapters"]))
    table.add_row("duration", f"{summary['duration']:.2f} s")
    table.add_row("requests", f"{summary['request_throughput']:,.2f} /s")
    table.add_row("output tokens", f"{summary['output_throughput']:,.1f} /s")
    table.add_row("all tokens", f"{summary['total_token_throughput']:,.1f} /s")
    return table

"""What a server's metrics page says of its adapters' tiers: of a run, the difference of two looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loadtest.watch import parse_label, parse_metrics

TIERS = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class TierCounts:
    """Where adapters were when requests asked for them, what was put out, and what loads took.

    `loads` and `load_seconds` are those of the server's histogram of loads.
    """

    lookups: Mapping[str, float]
    evictions: float
    loads: float
    load_seconds: float

    @classmethod
    def of_page(cls, page: str) -> TierCounts:
        """Read a metrics page. Raises ValueError if the server counts no lookups."""
        lookups = parse_label(page, "loramux_adapter_lookups_total", "tier")
        if not lookups:
            raise ValueError("the server's metrics have no loramux_adapter_lookups_total: it has no tiers")
        totals = parse_metrics(page)
        return cls(
            lookups,
            totals["loramux_adapter_evictions_total"],
            totals["loramux_adapter_load_seconds_count"],
            totals["loramux_adapter_load_seconds_sum"],
        )

    def since(self, before: TierCounts) -> TierCounts:
        """What came after `before`."""
        return TierCounts(
            {tier: count - before.lookups.get(tier, 0.0) for tier, count in self.lookups.items()},
            self.evictions - before.evictions,
            self.loads - before.loads,
            self.load_seconds - before.load_seconds,
        )

    def fields(self) -> dict[str, float]:
        """Hit rates by tier in percent of all lookups, evictions, loads and their mean in ms, ready for JSON."""
        asked = max(1.0, sum(self.lookups.values()))
        return {
            **{f"hit_{tier}_percent": 100.0 * self.lookups.get(tier, 0.0) / asked for tier in TIERS},
            "evictions": self.evictions,
            "loads": self.loads,
            "mean_load_ms": 1000.0 * self.load_seconds / max(1.0, self.loads),
        }

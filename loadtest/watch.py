"""Looks at a server from outside: its resident memory and its Prometheus page.

Knows metric names only as keys; what they should be is the soak's business.
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections import defaultdict
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

RESIDENT_METRIC = "process_resident_memory_bytes"


def resident_bytes(pid: int) -> int:
    """Return VmRSS of a process on this machine. Raises OSError when there is no such process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} has no resident memory; it has ended")


def parse_metrics(page: str) -> dict[str, float]:
    """Return sample name → value, summed over labels."""
    totals: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            totals[sample.name] += sample.value
    return dict(totals)


def parse_label(page: str, sample_name: str, label: str) -> dict[str, float]:
    """Return one sample's values by one of its labels."""
    return {
        sample.labels[label]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == sample_name
    }


async def fetch_page(url: str) -> str:
    """Fetch a metrics page. Raises OSError when it cannot be had within 10 seconds."""

    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310  the operator's own URL
            return str(response.read().decode())

    return await asyncio.to_thread(fetch)


async def scrape(url: str) -> dict[str, float]:
    """Fetch and parse a metrics page. Raises OSError when it cannot be had within 10 seconds."""
    return parse_metrics(await fetch_page(url))

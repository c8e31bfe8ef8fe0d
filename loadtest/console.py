"""What people see goes to stderr; stdout gets one line of JSON, so that `| jq` and `| tail -1` both work."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from loramux.terminal import Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest.cells import Cell
from loadtest.report import latency_table, rounded, throughput_table
from loadtest.trend import MIB, sparkline

err = Terminal(stderr=True)

LAG_LIMIT_MS = 20.0


def progress() -> Progress:
    """Return a progress bar on stderr; tasks take a `note` field."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=err,
    )


def emit(summary: Mapping[str, Any], file: Path | None = None) -> None:
    """Print the summary as the last and only line of stdout; write it to `file` too, if given."""
    line = json.dumps(rounded(summary))
    if file is not None:
        file.write_text(line + "\n")
    print(line)


def show_bench(summary: Mapping[str, Any]) -> None:
    """Show a benchmark's tables, and whether the driver got in its own way."""
    err.print(throughput_table(summary))
    err.print(latency_table(summary))
    if summary["driver_lag_ms_p99"] > LAG_LIMIT_MS:
        err.print(
            f"The driver's own loop was {summary['driver_lag_ms_p99']:.0f} ms late (p99): "
            "this machine is too busy for the latencies to be trusted; drive from another one.",
            style="yellow",
        )


def show_soak(summary: Mapping[str, Any], resident: list[int]) -> None:
    """Show a soak's table, its memory curve, and the verdict with its reasons."""
    table = Table(title="soak", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in summary["counts_before"].items():
        after = summary["counts_after"][name]
        table.add_row(name, f"{value:g}", f"{after:g}", style="" if after == value else "red")
    err.print(table)
    err.print(
        f"{summary['loads']:,} loads, {summary['unloads']:,} unloads "
        f"({summary['unloads_in_use']:,} while in use), {summary['completed']:,} requests, "
        f"{summary['cancelled']:,} cancelled by the client, {summary['failed']:,} failures, "
        f"{summary['duration']:.0f} s"
    )
    if resident:
        low, high = min(resident) / MIB, max(resident) / MIB
        err.print(f"resident memory, {low:,.0f} to {high:,.0f} MiB: {sparkline(resident)}")
    if "rss_growth_mib" in summary:
        err.print(
            f"growth after warm-up: {summary['rss_growth_mib']:.1f} MiB of {summary['rss_bound_mib']:.1f} allowed, "
            f"{summary['rss_bytes_per_cycle']:,.0f} bytes a cycle"
        )
    for problem in summary["problems"]:
        err.print(f"✗ {problem}", style="red")
    if not summary["problems"]:
        err.print("✓ nothing left behind", style="green")


def show_attacks(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show what good clients felt of each attack, and what it left behind."""
    table = Table(title="attacks, and what others felt", title_justify="left")
    columns = (
        "",
        "GetModel, longest s",
        "good requests",
        "lost",
        "memory, MiB",
        "descriptors",
        "took, s",
        "ended with",
    )
    for column in columns:
        table.add_column(column, justify="right" if column not in ("", "ended with") else "left")
    for row in rows:
        table.add_row(
            row["attack"],
            f"{row['longest_get_model_s']:.2f}",
            f"{row['slowest_good_s']:.2f}",
            f"{row['good']:,}",
            f"{sum(row['lost'].values()):,}",
            f"{row['rss_before_mib']:,.0f} → {row['rss_after_mib']:,.0f}",
            f"{row['descriptors_before']} → {row['descriptors_after']}",
            f"{row['seconds']:.1f}",
            ", ".join(f"{count} {status}" for status, count in row["outcomes"].items()),
        )
    err.print(table)


def show_comparison(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> None:
    """Show our server beside a peer."""
    table = Table(title=f"{ours['max_concurrency']} requests, {ours['adapters']} adapters", title_justify="left")
    table.add_column("")
    table.add_column("output tokens/s", justify="right")
    table.add_row("loramux, over gRPC", f"{ours['output_throughput']:,.1f}")
    table.add_row(f"PEFT adapter_names, {peer['weights']} base", f"{peer['output_throughput']:,.1f}")
    table.add_row("ratio", f"{ours['output_throughput'] / peer['output_throughput']:.2f}")
    err.print(table)


def show_cells(
    cells: Sequence[Cell], ours: Mapping[str, list[float]], peers: Mapping[str, Mapping[str, list[float]]]
) -> None:
    """Show medians, cell by cell, ours and the peers', and which peer is ahead of us."""
    title = "served, medians: output tokens/s, prompt tokens/s in prefill"
    table = Table(title=title, title_justify="left")
    for column in ("", "loramux", *peers):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    table.add_column("ahead", no_wrap=True)
    for cell in cells:
        own = median(ours[cell.name])
        theirs = {peer: median(rates[cell.name]) for peer, rates in peers.items() if cell.name in rates}
        shown = [f"{theirs[peer]:,.1f}" if peer in theirs else "–" for peer in peers]
        table.add_row(cell.name, f"{own:,.1f}", *shown, ahead(own, theirs))
    err.print(table)


def ahead(ours: float, peers: Mapping[str, float]) -> str:
    """Return the best of the peers and its rate over ours, if that is more than ours."""
    best = max(peers, key=lambda peer: peers[peer], default=None)
    return f"{best}, {peers[best] / ours:.2f} ×" if best is not None and peers[best] > ours else ""


def show_registered(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Show medians of runs by popularity; failures are of all runs."""
    table = Table(title="registered adapters, medians; hits are where adapters were", title_justify="left")
    table.add_column("")
    for name in found:
        table.add_column(name.removeprefix("registered_"), justify="right", no_wrap=True)
    rows = {
        "output tokens/s": ("output_throughput", ".1f"),
        "adapters used": ("distinct_adapters", ".0f"),
        "hits on the device, %": ("hit_device_percent", ".1f"),
        "hits in host memory, %": ("hit_host_percent", ".1f"),
        "read from disk, %": ("hit_disk_percent", ".1f"),
        "evictions": ("evictions", ".0f"),
        "loads": ("loads", ".0f"),
        "load, mean ms": ("mean_load_ms", ".1f"),
        "first token, median ms": ("median_ttft_ms", ".0f"),
        "first token, p99 ms": ("p99_ttft_ms", ".0f"),
        "driver's lag, p99 ms": ("driver_lag_ms_p99", ".1f"),
    }
    for title, (key, form) in rows.items():
        table.add_row(title, *(f"{median(s[key] for s in summaries):,{form}}" for summaries in found.values()))
    failed = [sum(summary["failed"] for summary in summaries) for summaries in found.values()]
    table.add_row("failures", *map(str, failed), style="red" if any(failed) else "")
    err.print(table)
    for name, summaries in found.items():
        for status, count in sum((Counter(s["errors"]) for s in summaries), Counter[str]()).items():
            err.print(f"✗ {name}: {count} failed with {status}", style="red")


def show_hotswap(summary: Mapping[str, Any]) -> None:
    """Show gaps between tokens with and without operations, and what failed."""
    table = Table(title="hot swap: between tokens, ms", title_justify="left")
    for column in ("", "median", "p99", "max", "gaps"):
        table.add_column(column, justify="right" if column else "left")
    for title, kind in (("without operations", "quiet"), ("with operations", "busy")):
        shown = [f"{summary[f'{kind}_{p}_itl_ms']:,.1f}" for p in ("p50", "p99", "max")]
        table.add_row(title, *shown, f"{summary[f'{kind}_gaps']:,}")
    err.print(table)
    rates = ", ".join(f"{rate:.1f} {kind}" for kind, rate in summary["per_minute"].items())
    err.print(
        f"p99 ratio {summary['itl_p99_ratio']:.2f}; {summary['completed']:,} answers; operations a minute: {rates}",
        soft_wrap=True,
    )
    for what, count in summary["errors"].items():
        err.print(f"✗ {what}: {count}", style="red")


def show_kernels(lines: Sequence[Mapping[str, Any]]) -> None:
    """Show the machine's limits, then every operation."""
    for line in lines:
        if line["bench"].startswith("machine_"):
            err.print(f"{line['bench']}: {line['value']:,} {line['unit']}")
    table = Table(title="operations, medians", title_justify="left")
    for column in ("", "µs", "GB/s of weights", "GFLOP/s", "bitsandbytes or torch, µs", "reference, µs"):
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        if "gb_per_s" in line:
            other = line.get("bitsandbytes_us", line.get("torch_us"))
            shown = [f"{value:,.1f}" if value is not None else "" for value in (other, line.get("reference_us"))]
            table.add_row(
                line["bench"], f"{line['value']:,.1f}", f"{line['gb_per_s']:.1f}", f"{line['gflop_per_s']:,.0f}", *shown
            )
    err.print(table)

"""What people see goes to stderr; stdout gets one line of JSON, so that `| jq` and `| tail -1` both work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest.cells import Cell
from loadtest.report import latency_table, rounded, throughput_table
from loadtest.trend import MIB, sparkline

err = Console(stderr=True)

LAG_LIMIT_MS = 20.0


def progress() -> Progress:
    """Return a progress bar on stderr; tasks take a `note` field."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=err,
    )


def emit(summary: Mapping[str, Any], file: Path | None = None) -> None:
    """Print the summary as the last and only line of stdout; write it to `file` too, if given."""
    line = json.dumps(rounded(summary), ensure_ascii=False)
    if file is not None:
        file.write_text(line + "\n")
    print(line)


def show_bench(summary: Mapping[str, Any]) -> None:
    """Show a benchmark's tables, and whether the driver got in its own way."""
    err.print(throughput_table(summary))
    err.print(latency_table(summary))
    if summary["driver_lag_ms_p99"] > LAG_LIMIT_MS:
        err.print(
            f"[yellow]The driver's own loop was {summary['driver_lag_ms_p99']:.0f} ms late (p99): "
            "this machine is too busy for the latencies to be trusted; drive from another one."
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
        err.print(f"[red]✗ {problem}")
    if not summary["problems"]:
        err.print("[green]✓ nothing left behind")


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

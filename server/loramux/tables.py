"""What the command line shows as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from loramux.answers import Adapter
from loramux.merge_report import MergeReport
from loramux.terminal import safe

if TYPE_CHECKING:
    from loramux.assembly import Application
    from loramux.plan import Plan
    from loramux.rpc.server import Addresses


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def startup_table(application: Application, addresses: Addresses) -> Table:
    """What is being served, how much memory each part takes, and where."""
    settings, model = application.settings, application.loaded.model
    facts = model.facts
    tokens = model.num_kv_blocks * model.block_size
    table = Table(title="loramux", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", safe(f"{facts.name}: {facts.architecture}, {facts.parameters / 1e6:.1f} M parameters"))
    table.add_row("compute", f"{facts.device}, {facts.dtype}, {facts.backend}")
    if facts.quantized_parameters:
        table.add_row("quantized weights", f"{facts.bits_per_weight:.3f} bits each, NF4, {size(facts.nf4_bytes)}")
    dense = "embedding, head, norms, biases" + (", merged layers" if settings.merged is not None else "")
    table.add_row("dense weights", f"{size(facts.dense_bytes)} ({dense})")
    table.add_row(
        "KV cache",
        f"{tokens:,} tokens, {size(tokens * model.kv_bytes_per_token)}; {facts.max_context:,} at most a request",
    )
    entries = application.adapters.list()
    used, resident = sum(entry.nbytes for entry in entries), sum(entry.weights is not None for entry in entries)
    table.add_row(
        "adapters",
        f"{len(entries)} known, {resident} loaded: {size(used)} of {size(settings.adapter_memory)}, and "
        f"{size(settings.adapter_host_memory)} for those put out",
    )
    table.add_row("adapter folders", safe(", ".join(map(str, settings.adapter_dir)) or "none: give --adapter-dir"))
    table.add_row("requests", safe(f"gRPC on {addresses.public}" + (" (TLS)" if settings.tls_cert else "")))
    table.add_row("admin", safe(f"gRPC on {addresses.admin}"))
    table.add_row("metrics", safe(f"http://{addresses.metrics}/metrics" if addresses.metrics else "off"))
    return table


def plan_table(plan: Plan) -> Table:
    """`loramux plan`: what takes how much of a GPU's memory, and what that holds."""
    table = Table(title="loramux plan", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    table.add_row("model", "", safe(f"{plan.model}: {plan.architecture}, {plan.parameters / 1e6:.1f} M parameters"))
    table.add_row("GPU memory", size(plan.gpu_bytes), "")
    table.add_row("CUDA context", size(plan.cuda_context_bytes), "an estimate; the server measures it")
    if plan.nf4_bytes:
        table.add_row("quantized weights", size(plan.nf4_bytes), f"NF4, {plan.bits_per_weight:.3f} bits each")
    table.add_row("dense weights", size(plan.dense_bytes), f"{plan.dtype}: embedding, head, norms, biases")
    fit = f"{_count(plan.adapters, 'adapter')} at once"
    one = f"{size(plan.one_adapter_bytes)} each of rank {plan.rank} on all {plan.linear_layers} linear layers"
    table.add_row("adapters", size(plan.adapter_bytes), f"{fit}: {one} (--adapter-memory)")
    table.add_row("step", size(plan.step_bytes), "at most, for a while (--max-batch-tokens)")
    table.add_row("CUDA graphs", size(plan.graphs_bytes), "at most" if plan.graphs_bytes else "none for this model")
    context = f"{plan.max_context:,} (--max-context)"
    if plan.max_context < plan.max_context_asked:
        context = f"{plan.max_context:,}, the model's most (--max-context {plan.max_context_asked:,})"
    if plan.problem is None:
        held = f"{_count(plan.sequences, 'sequence')} of {context}"
        bound = ", all that --max-batch-rows lets run" if plan.kv_bounded else ""
        told = f"{plan.kv_tokens:,} tokens, {size(plan.kv_bytes_per_token)} each: {held}{bound}"
        table.add_row("KV cache", size(plan.kv_bytes), told)
        table.add_row("left", size(plan.unused_bytes), _why_left(plan))
    else:
        table.add_row("missing", size(plan.missing_bytes), f"with a KV cache for sequences of {context}")
    return table


def _why_left(plan: Plan) -> str:
    if plan.kv_bounded:
        return "--max-batch-rows lets no more be used"
    if plan.kv_fraction:
        return f"a margin of {1 - plan.kv_fraction:.0%} of what the KV cache could take (--kv-memory)"
    return "--kv-memory takes no more"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def adapters_table(adapters: Iterable[Adapter]) -> Table:
    """`loramux adapters list`. Fits 80 columns; `--json` has everything in full."""
    table = Table(padding=(0, 1, 0, 0))
    for column in ("name", "state", "where", "rank", "size", "in use", "pinned"):
        table.add_column(column, no_wrap=column != "name", overflow="fold")
    table.add_column("targets, or what is wrong", overflow="fold")
    for a in adapters:
        table.add_row(
            safe(a.name),
            safe(a.state),
            safe(a.residency),
            str(a.max_rank or ""),
            size(a.size_bytes) if a.size_bytes else "",
            str(a.leases),
            "yes" if a.pinned else "",
            Text("\n").join(map(safe, [a.error] if a.error else _targets(a))),
        )
    return table


def _targets(adapter: Adapter) -> list[str]:
    return [", ".join(adapter.target_modules), *(f"warning: {warning}" for warning in adapter.warnings)]


def as_dict(adapter: Adapter) -> dict[str, Any]:
    """Everything known of an adapter, ready for JSON."""
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in asdict(adapter).items()}


def merge_table(report: MergeReport) -> Table:
    """`loramux merge`: how far each changed layer is from the exact sum."""
    table = Table("layer", "‖ΔW‖/‖W‖", "‖W'−(W+ΔW)‖/‖ΔW‖", title=f"Rounding to {report.dtype}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in report.layers:
        share = layer.delta_norm / layer.base_norm if layer.base_norm else math.inf
        table.add_row(safe(layer.layer), f"{share:.2%}", f"{layer.error:.3%}")
    table.add_section()
    table.add_row(safe(f"worst: {report.worst.layer}"), "", f"{report.worst.error:.3%}")
    table.add_row("all together", "", f"{report.overall:.3%}", style="bold")
    return table

"""`python -m loadtest attack`."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.attacks import ATTACKS, RESIDENT, Attack, Bystander, Victim, bystander, descriptors, write_resident
from loadtest.commands.options import JsonFile, ModelOption
from loadtest.console import emit, err, show_attacks
from loadtest.server_process import serve
from loadtest.trend import MIB
from loadtest.watch import resident_bytes

SETTLE = 1.0  # seconds of the bystander before and after an attack: what it felt late counts, too
LONGEST = 1.0  # seconds that GetModel may take


def attack(
    model: ModelOption = "smollm2",
    only: Annotated[str, typer.Option(help="Attacks whose name holds this.", metavar="WORDS")] = "",
    json_file: JsonFile = None,
) -> None:
    """Attack a server of its own in every way that a client or an adapter's author has, and tell what others feel.

    It starts `loramux serve` on loopback and attacks nothing else. While an attack runs, a process of its own asks
    GetModel fifty times a second and sends good requests. The command fails if one of these took longer than a second
    or did not end well.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loramux-attack-")))
        root = scratch / "adapters"
        root.mkdir()
        write_resident(root)
        address = stack.enter_context(
            serve(["--model", model, "--adapter-dir", str(root), "--adapter", RESIDENT], scratch)
        )
        assert address.pid is not None
        metrics = address.metrics.removeprefix("http://").removesuffix("/metrics")
        victim = Victim(address.target, address.admin, metrics, root, address.pid)
        watching = stack.enter_context(bystander(victim.public))
        rows = []
        for name, make in ATTACKS.items():
            if only in name:
                rows.append(_attacked(name, make(), victim, watching))
                err.print(f"{name}: {rows[-1]['longest_get_model_s']:.2f} s", highlight=False)
    show_attacks(rows)
    bad = [row["attack"] for row in rows if row["lost"] or row["longest_get_model_s"] > LONGEST]
    emit({"bench": "attack", "verdict": "fail" if bad else "pass", "harmful": bad, "attacks": rows}, json_file)
    if bad:
        raise typer.Exit(1)


def _attacked(name: str, run: Attack, victim: Victim, watching: Bystander) -> dict[str, Any]:
    memory, files = resident_bytes(victim.pid), descriptors(victim.pid)
    watching.begin()
    time.sleep(SETTLE)
    started = time.monotonic()
    outcomes = run(victim)
    seconds = time.monotonic() - started
    time.sleep(SETTLE)
    seen = watching.end()
    return {
        "attack": name,
        "seconds": seconds,
        "outcomes": dict(outcomes),
        "longest_get_model_s": seen.longest,
        "slowest_good_s": seen.slowest,
        "good": seen.good,
        "lost": dict(seen.lost),
        "rss_before_mib": memory / MIB,
        "rss_after_mib": resident_bytes(victim.pid) / MIB,
        "descriptors_before": files,
        "descriptors_after": descriptors(victim.pid),
    }

"""docs/gpu.md: between two markers, what was measured, a block for each device and each thing that was checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtest.gpu.report import Findings, Row

BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"
_BLOCK = re.compile(r"<!-- gpu-check: block (?P<what>[\w-]+) of (?P<device>.+?) -->\n")
NOTHING = "Nothing yet: **`make gpu-check` has never run on a GPU.**\n"
TITLES: Mapping[str, str] = {
    "machine": "The machine",
    "tests": "Tests on the device",
    "steps": "One decoding step, milliseconds",
    "gemm": "NF4 linear operations, microseconds",
    "served": "Served over gRPC, output tokens a second",
}


def update(file: Path, device: str, blocks: Mapping[str, str]) -> None:
    """Put `blocks` (what → text) of a device in the place of its older ones; others stay as they are.

    Raises ValueError if the file has not both markers.
    """
    text = file.read_text()
    before, begin, rest = text.partition(BEGIN + "\n")
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{file} has no lines {BEGIN} and {END} for the figures to go between")
    pieces = _BLOCK.split(inside)[1:]
    kept = {(who, what): body.strip() for what, who, body in zip(*(pieces[i::3] for i in range(3)), strict=True)}
    kept |= {(device, what): body.strip() for what, body in blocks.items()}
    order = list(TITLES)
    # Devices as they first came, each one's blocks in one order.
    devices = list(dict.fromkeys(who for who, _ in kept))
    keys = sorted(kept, key=lambda key: (devices.index(key[0]), order.index(key[1])))
    written = "".join(f"<!-- gpu-check: block {what} of {who} -->\n{kept[who, what]}\n\n" for who, what in keys)
    file.write_text(f"{before}{BEGIN}\n{written or NOTHING}{END}{after}")


def block(what: str, device: str, stamp: str, found: Findings) -> str:
    """The text of one block: what it is and of when, problems first, the table, then notes."""
    lines = [f"### {TITLES[what]}: {device}", "", stamp, ""]
    lines += [f"- **failed**: {plain(problem)}" for problem in found.problems]
    if found.problems:
        lines.append("")
    lines += table(found.rows)
    lines += [*(f"- {plain(note)}" for note in found.notes)]
    return "\n".join(lines).strip()


def columns(rows: Sequence[Row]) -> list[str]:
    """All columns of all rows, in the order in which they first come."""
    return list(dict.fromkeys(column for row in rows for column in row))


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table, and an empty line; nothing without rows."""
    if not rows:
        return []
    names = columns(rows)
    lines = [f"| {' | '.join(map(plain, names))} |", "|" + " --- |" * len(names)]
    lines += [f"| {' | '.join(cell(row.get(name)) for name in names)} |" for row in rows]
    return [*lines, ""]


def cell(value: object) -> str:
    """A number with three digits or all before the point; an en dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return plain(f"{value:,}" if isinstance(value, int) else str(value))


def plain(text: str) -> str:
    """On one line, and no end of a cell, no markup of HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

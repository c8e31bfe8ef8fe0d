"""What is found, a line of JSON each in rows.jsonl, written at once; and the document that is made of these lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.gpu.scale import Scale

Row = dict[str, Any]
BEGIN, END = "<!-- gpu-check: begin -->\n", "<!-- gpu-check: end -->"


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one part: where its findings go, which run of the check it belongs to (when, and of which commit),
    which table of the document they are for, and after how many seconds it is killed."""

    scale: Scale
    file: Path
    run: str
    table: str
    seconds: float

    def tell(self, **finding: Any) -> dict[str, Any]:
        """Append a finding, and return its line: row= (column → text or number), note= or problem= (a sentence)."""
        line = {"run": self.run, "table": self.table, **finding}
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        return line

    @contextmanager
    def row(self, **fields: Any) -> Iterator[Row]:
        """A row that is filled inside. What fails there is a problem; what was filled in is told, and the part goes on.

        Raises what broke the device: nothing after it could be trusted.
        """
        from loramux.ops.device import is_lost  # torch, which is not needed to read what was found

        row: Row = dict(fields)
        title = ", ".join(f"{name} {value}" for name, value in fields.items())
        print(title, flush=True)  # the log's last line says where a part died
        try:
            yield row
        except Exception as error:
            self.tell(problem=f"{title}: {type(error).__name__}: {(str(error) or '-').splitlines()[0]}")
            if is_lost(error):
                raise
        finally:
            self.tell(row=row)

    @property
    def bandwidth(self) -> float:
        """GB/s of the last copy of the part `machine`; infinite if it is not known, so that nothing takes any time."""
        rates = [line["row"].get("GB/s") for line in read(self.file) if line["table"] == "machine" and "row" in line]
        return float(rates[-1] or math.inf) if rates else math.inf


def read(file: Path, start: int = 0) -> list[dict[str, Any]]:
    """The findings from a byte of the file on; a line that is not whole is none: its writer was killed in it."""
    found = []
    for line in (file.read_bytes() if file.exists() else b"")[start:].splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def render(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: of each table and device the last run that has it."""
    machines = {line["run"]: line["row"] for line in lines if line["table"] == "machine" and "row" in line}
    tables: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        device = machines.get(line["run"], {}).get("device", "unknown device")
        tables.setdefault((line["table"], device), {}).setdefault(line["run"], []).append(line)
    sections = []
    for (table, device), runs in tables.items():
        run, found = runs.popitem()
        versions = ("driver", "torch", "triton", "transformers", "bitsandbytes")
        stamp = [run, *(f"{name} {machines.get(run, {}).get(name, '?')}" for name in versions)]
        problems = [f"- **failed**: {plain(line['problem'])}" for line in found if "problem" in line]
        rows = markdown([line["row"] for line in found if "row" in line])
        notes = [f"- {plain(line['note'])}" for line in found if "note" in line]
        paragraphs = ([f"### {table}: {device}"], [", ".join(stamp)], problems, rows, notes)
        sections.append("\n\n".join("\n".join(lines) for lines in paragraphs if lines) + "\n")
    return "\n".join(sections)


def update(document: Path, text: str) -> None:
    """Put `text` between the two markers. Raises ValueError if the file has not both."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} has no lines {BEGIN} and {END} for the figures to go between")
    document.write_text(before + begin + text + end + after)


def markdown(rows: Sequence[Row]) -> list[str]:
    """A table of all columns of all rows, in the order in which they first come; nothing of no rows."""
    names = list(dict.fromkeys(column for row in rows for column in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines] if rows else []


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

"""What was found, a line of JSON each in rows.jsonl, written at once; and the document that is made of these lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from loadtest.gpu.scale import Scale

T = TypeVar("T")
Row = dict[str, Any]
BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"
NOTHING = "Nothing yet: **`make gpu-check` has never run on a GPU.**\n"


class OutOfTime(Exception):
    """The part's time is up; what it has is written down."""


@dataclass(slots=True)
class Report:
    """Appends lines to a file: which run, which table of the document, what kind of finding, the finding."""

    file: Path
    run: str
    table: str

    def commit(self, commit: str) -> None:
        """What is checked."""
        self._append("commit", commit)

    def _append(self, what: str, value: object) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps({"run": self.run, "table": self.table, what: value}) + "\n")

    def row(self, row: Row) -> None:
        """A row of the table: column → text, number, or None for what was not measured."""
        self._append("row", row)

    @contextmanager
    def filling(self, **fields: Any) -> Iterator[Row]:
        """A row that is filled inside, and written with what it has whatever ends it."""
        row: Row = dict(fields)
        try:
            yield row
        finally:
            self.row(row)

    def note(self, text: str) -> None:
        """A sentence that the figures need beside them."""
        self._append("note", text)

    def problem(self, text: str) -> None:
        """What went wrong, in a sentence. The check fails."""
        self._append("problem", text)

    def at(self, text: str) -> None:
        """What is about to be done, so that one knows where a part died."""
        self._append("at", text)


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one part. `deadline` is of time.monotonic; `bandwidth` in bytes a second, 0 if unknown."""

    scale: Scale
    report: Report
    deadline: float
    bandwidth: float = 0.0

    @property
    def left(self) -> float:
        """Seconds until the part should end."""
        return self.deadline - time.monotonic()

    def attempt(self, what: str, measure: Callable[[], T]) -> T | None:
        """What `measure` returns; None, with a problem in the report, if it fails.

        Raises OutOfTime instead of beginning too late, and what broke the device: nothing after it could be trusted.
        """
        if self.left <= 0:
            raise OutOfTime
        self.report.at(what)
        try:
            return measure()
        except OutOfTime:  # of an attempt within this one
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            self.report.problem(f"{what}: {text}")
            # What may not be recorded in a graph breaks nothing.
            if type(error).__name__ == "AcceleratorError" and "captur" not in text:
                raise
            return None


@dataclass(slots=True)
class Findings:
    """All that one run says of one table."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """One run: its machine row (device, versions, "GB/s"), its commit, and what it found, by table."""

    name: str
    commit: str = "unknown"
    tables: dict[str, Findings] = field(default_factory=dict)

    @property
    def machine(self) -> Row:
        """Empty if the machine was not described."""
        found = self.tables.get("machine")
        return found.rows[-1] if found and found.rows else {}

    @property
    def stamp(self) -> str:
        """When, and with what."""
        machine = self.machine
        names = ("driver", "torch", "triton", "transformers", "bitsandbytes")
        return ", ".join([self.name, *(f"{n} {machine.get(n, '?')}" for n in names), f"loramux {self.commit}"])


def parse(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines that are whole: a writer may have been killed in the middle of one."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def read(file: Path) -> list[Run]:
    """The runs in a file, oldest first; none if there is no file."""
    runs: dict[str, Run] = {}
    for line in parse(file.read_text().splitlines() if file.exists() else ()):
        run = runs.setdefault(line["run"], Run(line["run"]))
        run.commit = line.get("commit", run.commit)
        for what in {"row", "note", "problem"} & line.keys():
            getattr(run.tables.setdefault(line["table"], Findings()), f"{what}s").append(line[what])
    return list(runs.values())


def render(runs: Sequence[Run]) -> str:
    """Markdown: by device and table, of the last run that has it."""
    last = {(run.machine.get("device", "unknown device"), table): (run, found) for run in runs
            for table, found in run.tables.items()}  # fmt: skip
    sections = []
    for (device, table), (run, found) in last.items():
        lines = [f"### {table}: {device}", "", run.stamp, ""]
        lines += [*(f"- **failed**: {plain(problem)}" for problem in found.problems), ""] if found.problems else []
        lines += markdown(found.rows)
        lines += [f"- {plain(note)}" for note in found.notes]
        sections.append("\n".join(lines).strip() + "\n")
    return "\n".join(sections) or NOTHING


def update(document: Path, text: str) -> None:
    """Put `text` between the two markers. Raises ValueError if the file has not both."""
    before, begin, rest = document.read_text().partition(BEGIN + "\n")
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} has no lines {BEGIN} and {END} for the figures to go between")
    document.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def markdown(rows: Sequence[Row]) -> list[str]:
    """A table of all columns of all rows, in the order in which they first come, and an empty line; or nothing."""
    if not rows:
        return []
    names = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(map(plain, names))} |", "|" + " --- |" * len(names)]
    return [*lines, *(f"| {' | '.join(cell(row.get(name)) for name in names)} |" for row in rows), ""]


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

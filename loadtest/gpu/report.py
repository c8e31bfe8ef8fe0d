"""What a part of the GPU check has found, written down at once: a part that crashes or hangs keeps what it had."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Report:
    """Appends to a file, one JSON object a line; the process that reads it may find it cut off anywhere."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def _append(self, kind: str, value: object) -> None:
        with self._file.open("a") as out:
            out.write(json.dumps({kind: value}) + "\n")

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of the part's table: column → text, number, or None for what was not measured."""
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


@dataclass(slots=True)
class Findings:
    """A report that was read back."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    at: str = ""

    @classmethod
    def read(cls, file: Path) -> Findings:
        """All that is whole in the file; nothing if there is none."""
        found = cls()
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                ((kind, value),) = json.loads(line).items()
            except ValueError:  # the line in which the writer was killed
                continue
            match kind:
                case "row":
                    found.rows.append(value)
                case "note":
                    found.notes.append(value)
                case "problem":
                    found.problems.append(value)
                case _:
                    found.at = value
        return found

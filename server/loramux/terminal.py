"""Consoles that print what files, names and peers say as it is: never as markup, never as a terminal's commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from loramux.escaping import escape

# What a model's text may do to a terminal: end a line, step to a tab stop, join letters and emoji, keep words together.
_IN_TEXT = "\n\t\u00a0\u200c\u200d\u202f\u3000"


class Terminal(Console):
    """A rich Console without markup, emoji codes and highlighting, and where no text reaches the terminal unescaped.

    Style is given by `style=` or a Text. Whatever is rendered (tables, bars, texts) is escaped line by line.
    """

    def __init__(
        self,
        file: IO[str] | None = None,
        *,
        stderr: bool = False,
        force_terminal: bool | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__(
            file=file,
            stderr=stderr,
            force_terminal=force_terminal,
            width=width,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As Console; only rich's own control segments pass as they are."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield segment._replace(text=escape(segment.text, keep="\n"))


def safe(text: object, *, keep: str = "") -> Text:
    """A Text of somebody else's words, for a table or a bar of any console."""
    return Text(escape(str(text), keep=keep))


def sentence(text: str) -> str:
    """`text` on one line, escaped."""
    return escape(" ".join(text.split()))


def generated(text: str) -> str:
    """A model's text as standard output gets it: a terminal obeys none of it, a pipe or a file gets every byte."""
    return escape(text, keep=_IN_TEXT) if sys.stdout.isatty() else text

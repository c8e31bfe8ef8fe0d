"""Warnings that come back at every look, logged when they are new. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping

_MOST_LINES = 20  # of one occasion; thousands of folders may be wrong in one way


class ToldOnce:
    """What was told about each subject, such as a folder; told again only if it changed in between."""

    def __init__(self, log: logging.Logger, *, level: int = logging.WARNING) -> None:
        self._log = log
        self._level = level
        self._told: dict[str, str] = {}

    def tell(self, subject: str, text: str, *, traceback: BaseException | None = None) -> None:
        """Log `text`, unless it is what was told about the subject last."""
        if self._told.get(subject) != text:
            self._told[subject] = text
            self._log.log(self._level, "%s", text, exc_info=traceback)

    def tell_all(self, texts: Mapping[str, str], what: str) -> None:
        """The text by subject of all that is wrong now; others are forgotten. Beyond some lines `what` are counted."""
        new = [text for subject, text in texts.items() if self._told.get(subject) != text]
        self._told = dict(texts)
        for text in new[:_MOST_LINES]:
            self._log.log(self._level, "%s", text)
        if len(new) > _MOST_LINES:
            self._log.log(self._level, "and %d more %s", len(new) - _MOST_LINES, what)

    def forget(self, subject: str) -> None:
        """It is right again."""
        self._told.pop(subject, None)

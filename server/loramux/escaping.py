"""Untrusted text made fit for a terminal or a log: names, paths, messages of files and peers. Imports nothing heavy."""

from __future__ import annotations


def escaped(text: str, limit: int | None = None) -> str:
    """One line without control characters, ANSI escapes, bidi overrides, invisible characters or lone surrogates.

    What Python does not call printable becomes an escape as in a string literal (`\\n`, `\\x1b`, `\\u202e`); the rest
    stays, backslashes too. At most `limit` characters of `text` are kept, and the cut is told.
    """
    if limit is not None and len(text) > limit:
        return f"{escaped(text[:limit])}… ({len(text) - limit} characters more)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

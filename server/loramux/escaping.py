"""Text from files, names and peers, made harmless for a terminal and for a log: every such text passes here first."""

from __future__ import annotations


def encodable(text: str) -> str:
    """`text` with lone surrogates escaped: a protobuf string, or anything in UTF-8, cannot hold them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def escape(text: str, *, keep: str = "", limit: int | None = None) -> str:
    r"""`text` with every character that is not printable as in a string literal (`\n`, `\x1b`, `\u202e`); one line.

    Those are control characters (ESC, newlines, C1), what turns the writing direction or joins and hides characters,
    separators other than the space, lone surrogates, and what Unicode has not assigned. Those in `keep` stay, and so do
    backslashes. At most `limit` characters of `text` are kept, and the cut is told.
    """
    if limit is not None and len(text) > limit:
        return f"{escape(text[:limit], keep=keep)}… ({len(text) - limit} characters more)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)

"""Text from files, names and peers, made harmless for a terminal and for a log: every such text passes here first."""

from __future__ import annotations


def escape(text: str, *, keep: str = "") -> str:
    r"""`text` with every character that is not printable as `\xNN`, `\uNNNN` or `\UNNNNNNNN`; ends no line.

    Those are control characters (ESC, newlines, C1), what turns the writing direction or joins and hides characters,
    separators other than the space, lone surrogates, and what Unicode has not assigned. Those in `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(ord(c)) for c in text)


def _escaped(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

"""What reaches a terminal or a log of somebody else's text."""

from __future__ import annotations

import sys

import pytest
from loramux.escaping import escape


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [/bold]x", "plain [/bold]x"),  # markup is for whoever prints to switch off
        ("Zürich 東京 🙂 ‖ΔW‖ ≤ …", "Zürich 東京 🙂 ‖ΔW‖ ≤ …"),
        (r"C:\x", r"C:\x"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("one\ntwo\r\n\tthree", r"one\ntwo\r\n\tthree"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202egnp.exe\u2066\u200f", r"\u202egnp.exe\u2066\u200f"),
        ("a\u2028b\u2029c\u200bd\ufeff", r"a\u2028b\u2029c\u200bd\ufeff"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("\U000e0041", r"\U000e0041"),  # a tag character: invisible text
        ("\x00\x7f", r"\x00\x7f"),
    ],
)
def test_what_is_not_printable_is_spelt_out(text: str, shown: str) -> None:
    assert escape(text) == shown


def test_no_character_at_all_gets_through_unprintable() -> None:
    shown = escape("".join(map(chr, range(sys.maxunicode + 1))))
    assert shown.isprintable()
    shown.encode()  # no lone surrogates


def test_what_is_kept_stays() -> None:
    assert escape("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"

"""Stop strings over the seams of pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loramux.engine.stop_strings import StopScanner


def _scan(stops: list[str], pieces: list[str]) -> tuple[str, str]:
    scanner = StopScanner(stops)
    text = "".join(scanner.feed(piece) for piece in pieces)
    return text + scanner.flush(), scanner.found


def _naive(stops: list[str], text: str) -> tuple[str, str]:
    """The first end of any stop string; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, ""


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("abc", max_size=4), max_size=10),
)
def test_equals_a_search_in_the_whole_text(stops: list[str], pieces: list[str]) -> None:
    assert _scan(stops, pieces) == _naive(stops, "".join(pieces))


def test_a_possible_beginning_is_held_back_and_no_more() -> None:
    scanner = StopScanner(["\n\nHuman:"])
    assert scanner.feed("answer\n") == "answer"
    assert scanner.feed("\nHum") == ""
    assert scanner.feed("or") == "\n\nHumor"
    assert scanner.feed("\n\nHuman: more") == ""
    assert scanner.found == "\n\nHuman:"
    assert scanner.feed("later") == ""
    assert scanner.flush() == ""


def test_text_before_the_stop_string_in_one_piece() -> None:
    assert _scan(["STOP"], ["one STOP two STOP"]) == ("one ", "STOP")


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopScanner([]).feed("text") == "text"


@pytest.mark.parametrize("pieces", [["aab"], ["a", "a", "b"], ["aa", "ab"]])
def test_overlapping_beginnings(pieces: list[str]) -> None:
    text, found = _scan(["ab"], pieces)
    assert (text, found) == ("".join(pieces)[:-2], "ab")

"""Stop strings over the seams of pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loramux.engine.stop_strings import StopScanner, Symbol


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


TOKENS = {"<x>": 1, "<xy>": 2}
WITH_TOKENS = st.lists(st.sampled_from(["a", "b", "<", "x", ">", "<x>", "<xy>"]), min_size=1, max_size=4).map("".join)


def _split(text: str) -> list[Symbol]:
    symbols: list[Symbol] = []
    while text:
        name = next((t for t in TOKENS if text.startswith(t)), text[0])
        symbols.append(TOKENS.get(name, name))
        text = text[len(name) :]
    return symbols


def _naive_with_tokens(stops: list[str], stream: list[Symbol], too_early: int) -> tuple[str, str]:
    """As `_naive`; the first `too_early` symbols complete nothing."""
    for end in range(too_early + 1, len(stream) + 1):
        seen = stream[:end]
        text = "".join(s for s in seen if isinstance(s, str))
        found = {stop: len(stop) for stop in stops if isinstance(seen[-1], str) and text.endswith(stop)}
        for stop in stops:
            symbols = _split(stop)
            if any(isinstance(s, int) for s in symbols) and seen[-len(symbols) :] == symbols:
                found[stop] = sum(isinstance(s, str) for s in symbols)
        if found:
            longest = max(found, key=len)
            return text[: len(text) - found[longest]], longest
    return "".join(s for s in stream if isinstance(s, str)), ""


@given(
    st.lists(WITH_TOKENS, max_size=3),
    st.lists(st.sampled_from(["a", "b", "<", "x", ">", 1, 2]), max_size=20),
    st.integers(0, 8),
)
def test_special_tokens_and_what_is_too_early(stops: list[str], stream: list[Symbol], too_early: int) -> None:
    scanner = StopScanner(stops, _split)
    text = ""
    for i, symbol in enumerate(stream):
        may_stop = i >= too_early
        if isinstance(symbol, str):
            text += scanner.feed(symbol, may_stop=may_stop)
        else:
            text += scanner.feed_special(symbol, may_stop=may_stop)
    text += scanner.flush()
    assert (text, scanner.found) == _naive_with_tokens(stops, stream, too_early)


def test_scanners_of_one_request_share_nothing_that_changes() -> None:
    one = StopScanner(["ab"])
    one.feed("a")
    two = one.fork()
    assert two.feed("b") == "b"
    assert one.feed("b") == ""
    assert (one.found, two.found) == ("ab", "")

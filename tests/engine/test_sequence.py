"""What ends a sequence: tokens, stop strings with and without special tokens, min_new_tokens, its length."""

from __future__ import annotations

from typing import Any

import pytest
from loramux.engine.detokenizer import Detokenizer
from loramux.engine.group import make_group
from loramux.engine.request import FinishReason
from tokenizers import AddedToken

from .fakes import EOS, byte_tokenizer, request

TOKENIZER = byte_tokenizer()
TOKENIZER.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_end|>", "<|im|>")])
IM_END, IM = EOS + 1, EOS + 2
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
DETOKENIZER = Detokenizer(TOKENIZER)


def _run(output: list[int | str], **sampling: Any) -> tuple[str, FinishReason | None, str, int]:
    """Text, reason, stop string and number of tokens of a sequence that is given these tokens, one for a byte of a
    text."""
    tokens = [t for piece in output for t in (piece.encode() if isinstance(piece, str) else [piece])]
    knobs = {"max_new_tokens": 100, "ignore_eos": False} | sampling
    group = make_group(
        request([1, 2], **knobs),
        lambda event: None,
        seed=0,
        rank=(0.0, 0),
        arrival=0.0,
        max_context=200,
        eos_token_ids=frozenset({EOS}),
        detokenizer=DETOKENIZER,
    )
    [seq] = group.sequences
    text, reason = "", None
    for token in tokens:
        piece, reason = seq.accept(token)
        text += piece
        if reason is not None:
            break
    return text, reason, seq.scanner.found, seq.num_output


@pytest.mark.parametrize("least", range(4))
def test_a_stop_string_may_begin_before_min_new_tokens(least: int) -> None:
    """vLLM #21987, #22014: what was generated before the minimum was never looked at."""
    assert _run(["abcdefg"], stop=("bcd",), min_new_tokens=least) == ("a", STOP, "bcd", 4)


@pytest.mark.parametrize("least", range(4, 7))
def test_a_stop_string_within_min_new_tokens_is_passed_over(least: int) -> None:
    assert _run(["abcdefg"], stop=("bcd",), min_new_tokens=least) == ("abcdefg", None, "", 7)
    assert _run(["abcdefbcdg"], stop=("bcd",), min_new_tokens=least) == ("abcdef", STOP, "bcd", 9)


def test_what_was_passed_over_may_begin_the_next_one() -> None:
    assert _run(["xaaab"], stop=("aa",), min_new_tokens=3) == ("xa", STOP, "aa", 4)


def test_a_stop_string_that_the_last_token_completes() -> None:
    assert _run(["abc"], stop=("bc",), max_new_tokens=3) == ("a", STOP, "bc", 3)
    assert _run(["abc"], stop=("bc",), max_new_tokens=3, min_new_tokens=3) == ("abc", LENGTH, "", 3)
    assert _run(["ab"], stop=("bc",), max_new_tokens=2) == ("ab", LENGTH, "", 2)


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize(("token", "name"), [(IM_END, "<|im_end|>"), (IM, "<|im|>"), (EOS, "<eos>")])
def test_a_stop_string_that_is_a_special_token(token: int, name: str, ignore_eos: bool) -> None:
    """It has no text, and ends the sequence all the same; whether or not it would have ended it anyway."""
    assert _run(["hi", token, "more"], stop=(name,), ignore_eos=ignore_eos) == ("hi", STOP, name, 3)


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize(("token", "name"), [(IM_END, "<|im_end|>"), (EOS, "<eos>")])
def test_a_stop_string_of_text_and_a_special_token(token: int, name: str, ignore_eos: bool) -> None:
    stop = f"i{name}"
    assert _run(["hi", token, "!"], stop=(stop,), ignore_eos=ignore_eos) == ("h", STOP, stop, 3)
    assert _run(["hx", IM, token, "!"], stop=(stop,), ignore_eos=True) == ("hx!", None, "", 5)


def test_a_stop_string_that_goes_on_after_a_special_token() -> None:
    output: list[int | str] = ["hi", IM_END, "\n", IM, "user"]
    assert _run(output, stop=("<|im_end|>\n<|im|>u",)) == ("hi", STOP, "<|im_end|>\n<|im|>u", 6)


def test_a_special_token_written_out_is_a_stop_string_too() -> None:
    assert _run(["hi<|im_end|>more"], stop=("<|im_end|>",)) == ("hi", STOP, "<|im_end|>", 12)


def test_a_part_of_a_special_tokens_name_is_not_its_text() -> None:
    assert _run(["hi", IM_END, "x"], stop=("|>", "im", "<")) == ("hix", None, "", 4)


def test_special_tokens_do_not_part_the_text_of_other_stop_strings() -> None:
    assert _run(["ab", IM, "cd"], stop=("bc",)) == ("a", STOP, "bc", 4)


@pytest.mark.parametrize("least", [2, 3])
def test_min_new_tokens_holds_for_special_tokens_in_stop_strings(least: int) -> None:
    stopped = ("a", STOP, "b<|im_end|>", 3) if least < 3 else ("abc", None, "", 4)
    assert _run(["ab", IM_END, "c"], stop=("b<|im_end|>",), min_new_tokens=least) == stopped


def test_what_ends_the_sequence_frees_what_was_held_back() -> None:
    assert _run(["ab", EOS], stop=("bc",)) == ("ab", STOP, "", 3)
    assert _run(["a", 0xF0, EOS]) == ("a\ufffd", STOP, "", 3)


def test_special_tokens_are_found_in_a_text() -> None:
    assert DETOKENIZER.split("a<|im|><|im_end|>") == ["a", IM, IM_END]
    assert DETOKENIZER.split("<|im_end") == list("<|im_end")
    assert DETOKENIZER.split("<<eos>") == ["<", EOS]

"""Pieces of text add up to what `decode` gives for the whole, and are valid UTF-8 all along."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loramux.engine.detokenizer import MAX_HELD_TOKENS, Detokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .fakes import byte_tokenizer

TEXT = "Hello, wörld! 😀👨‍👩‍👧 naïve café — 日本語のテキスト, emoji 🏳️‍🌈 again 😀😀\n\ttabs  and   spaces"


def _trained() -> Tokenizer:
    """A small byte-level BPE, as SmolLM2's, with merges inside and across characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken("<eos>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """Llama-2's decoder: byte fallback, and a leading space that is dropped at the start."""
    vocab = {"<unk>": 0, "▁": 1, "▁the": 2, "a": 3, "▁b": 4} | {f"<0x{i:02X}>": 5 + i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer).open()
    pieces = [stream.push(i) for i in ids]
    pieces.append(stream.flush())
    for piece in pieces:
        piece.encode()  # no lone surrogates
    return pieces


TRAINED = _trained()
SENTENCEPIECE = _sentencepiece()
BYTES = byte_tokenizer()


@pytest.mark.parametrize("tokenizer", [TRAINED, BYTES], ids=["trained", "bytes"])
def test_pieces_add_up_to_transformers_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    pieces = _pieces(tokenizer, ids)
    assert "".join(pieces) == fast.decode(ids, skip_special_tokens=True) == TEXT
    assert not any("\ufffd" in piece for piece in pieces), "part of a character was given out"
    assert pieces[0] != "", "text is not held back without a reason"


@given(st.lists(st.integers(0, 319), max_size=MAX_HELD_TOKENS))
def test_any_tokens_add_up_to_decode(ids: list[int]) -> None:
    """Sampled tokens need not be valid UTF-8, and special ones stand anywhere."""
    assert "".join(_pieces(TRAINED, ids)) == TRAINED.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_any_text_survives_byte_tokens(text: str) -> None:
    assert "".join(_pieces(BYTES, list(text.encode()))) == text


def test_emoji_comes_out_whole_with_its_last_byte() -> None:
    pieces = _pieces(BYTES, list("a😀b".encode()))
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_special_token_inside_a_character_changes_nothing() -> None:
    ids = list("😀".encode())
    assert "".join(_pieces(BYTES, [*ids[:2], 256, *ids[2:]])) == "😀"


def test_end_inside_a_character_is_flushed() -> None:
    """DecodeStream would lose it: it has no flush."""
    assert _pieces(BYTES, list("ok😀".encode())[:-1])[-1] == "\ufffd"
    assert _pieces(BYTES, [0x80])[-1] == "\ufffd"


def test_garbage_is_not_held_for_ever() -> None:
    """Each token is decoded together with those held back: without a bound, endless garbage costs quadratic time."""
    stream = Detokenizer(BYTES).open()
    longest = 0
    for _ in range(1000):
        stream.push(0x80)
        longest = max(longest, len(stream._ids))
    assert longest <= 2 * MAX_HELD_TOKENS + 2


def test_leading_space_follows_decode_of_the_output_alone() -> None:
    ids = [2, 4, 3, 1, 2, 1, 1, 4]
    assert "".join(_pieces(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids)
    assert _pieces(SENTENCEPIECE, ids)[:3] == ["the", " b", "a"]


def test_byte_fallback_characters() -> None:
    ids = [2, *(5 + b for b in "é€😀".encode()), 3]
    pieces = _pieces(SENTENCEPIECE, ids)
    assert "".join(pieces) == "theé€😀a"
    assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, 260), max_size=40))
def test_malformed_byte_fallback_never_raises(ids: list[int]) -> None:
    """DecodeStream raises "Invalid prefix" here: a later byte turns a run of byte tokens into U+FFFD altogether."""
    _pieces(SENTENCEPIECE, ids)


def test_token_text() -> None:
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.token_text(ord("a")) == "a"
    assert detokenizer.token_text(0xF0) == "\ufffd"
    assert detokenizer.token_text(256) == "<eos>"


def test_long_random_text_in_linear_steps() -> None:
    words = random.Random(0).choices(TEXT.split(), k=400)
    text = " ".join(words)
    ids = TRAINED.encode(text).ids
    assert "".join(_pieces(TRAINED, ids)) == text

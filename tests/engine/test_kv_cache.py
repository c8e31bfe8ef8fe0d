"""Blocks: who holds them, which are remembered, which go first."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Any

import pytest
from loramux.engine import kv_cache
from loramux.engine.detokenizer import Detokenizer
from loramux.engine.group import make_group
from loramux.engine.kv_cache import KVCache, cache_root
from loramux.engine.sequence import Sequence

from .fakes import byte_tokenizer, request

DETOKENIZER = Detokenizer(byte_tokenizer())


def sequence(prompt: Any, *adapters: Any, **knobs: Any) -> Sequence:
    group = make_group(
        request(prompt, *adapters, **knobs),
        lambda event: None,
        seed=0,
        rank=(0.0, 0),
        arrival=0.0,
        max_context=1000,
        eos_token_ids=frozenset(),
        detokenizer=DETOKENIZER,
    )
    return group.sequences[0]


def _computed(kv: KVCache, prompt: Any) -> Sequence:
    seq = sequence(prompt)
    assert kv.admit(seq, headroom=0)
    seq.computed = len(seq.tokens)
    kv.commit(seq)
    return seq


def test_prefix_is_shared_while_it_is_held_and_after() -> None:
    kv = KVCache(8, 4)
    first = _computed(kv, range(13))
    second = _computed(kv, range(13))
    assert second.blocks[:3] == first.blocks[:3]
    assert second.blocks[3] != first.blocks[3], "a partial block is never shared"
    assert kv.num_used == 5
    kv.check([first, second])
    kv.release(first)
    kv.release(first)
    kv.release(second)
    kv.check([])
    assert kv.num_used == 0
    third = sequence(range(13))
    assert kv.admit(third, headroom=0)
    assert third.computed == 12


def test_last_token_is_always_computed() -> None:
    kv = KVCache(8, 4)
    kv.release(_computed(kv, range(12)))
    again = sequence(range(12))
    assert kv.admit(again, headroom=0)
    assert again.computed == 8


def test_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    kv = KVCache(6, 4)
    old = _computed(kv, range(12))
    new = _computed(kv, range(100, 112))
    kv.release(old)
    kv.release(new)
    kv.release(_computed(kv, range(200, 205)))  # takes two blocks: the ends of `old`
    survivor, evicted = sequence(range(100, 113)), sequence(range(13))
    assert kv.admit(survivor, headroom=0)
    assert survivor.computed == 12
    kv.release(survivor)
    assert kv.admit(evicted, headroom=0)
    assert evicted.computed == 4
    kv.check([evicted])


def test_refused_admission_changes_nothing() -> None:
    kv = KVCache(4, 4)
    kv.release(_computed(kv, range(8)))
    large = sequence(range(17))
    assert not kv.admit(large, headroom=0)
    fits = sequence(range(9))
    assert not kv.admit(fits, headroom=2), "its cached blocks are free blocks too"
    assert kv.num_used == 0
    kv.check([])
    assert kv.admit(fits, headroom=1)
    assert fits.computed == 8


def test_reserve_is_all_or_nothing() -> None:
    kv = KVCache(3, 4)
    seq = sequence(range(4))
    assert kv.admit(seq, headroom=0)
    seq.tokens.extend(range(12))
    assert not kv.reserve(seq)
    assert len(seq.blocks) == 1
    del seq.tokens[12:]
    assert kv.reserve(seq)
    assert kv.num_free == 0


def test_equal_block_after_different_prefix_is_another_block() -> None:
    """A key is chained: the same four tokens after another beginning have other keys and values."""
    kv = KVCache(8, 4)
    kv.release(_computed(kv, [1, 1, 1, 1, 9, 9, 9, 9]))
    other = sequence([2, 2, 2, 2, 9, 9, 9, 9, 3])
    assert kv.admit(other, headroom=0)
    assert other.computed == 0


def test_python_hash_collisions_do_not_meet() -> None:
    """hash(-1) == hash(-2) and hash(2**61 - 1) == hash(0) in Python: a cache keyed by hash() would mix them up."""
    kv = KVCache(8, 4)
    kv.release(_computed(kv, [0, 0, 0, 0, 5]))
    assert hash((2**61 - 1,)) == hash((0,))
    other = sequence([2**61 - 1, 0, 0, 0, 5])
    assert kv.admit(other, headroom=0)
    assert other.computed == 0


@pytest.mark.parametrize(
    "other",
    [
        ((("a", 1.0),), "x"),
        ((("a", 1.0 + 2**-52),), ""),
        ((("a", 1.0), ("b", 1.0)), ""),
        ((), '[["a", 1.0]]'),
        ((), ""),
    ],
)
def test_roots_differ(other: tuple[tuple[tuple[str, float], ...], str]) -> None:
    assert cache_root((("a", 1.0),), "") != cache_root(*other)


def test_check_finds_a_lost_block() -> None:
    kv = KVCache(4, 4)
    seq = _computed(kv, range(8))
    with pytest.raises(AssertionError, match="references"):
        kv.check([])
    seq.blocks = array("i", [seq.blocks[0], seq.blocks[0]])
    with pytest.raises(AssertionError):
        kv.check([seq])


def test_the_prompt_of_n_sequences_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    monkeypatch.setattr(kv_cache, "blake2b", lambda data, **knobs: (hashed.append(data), blake2b(data, **knobs))[1])
    first, *others = sequence(range(40), n=8).group.sequences
    kv = KVCache(200, 4)
    assert kv.admit(first, headroom=0)
    first.tokens.extend(range(100, 120))  # what it generated is its own
    assert kv.reserve(first)
    first.computed = len(first.tokens)
    kv.commit(first)
    before = len(hashed)
    for i, seq in enumerate(others):
        seq.tokens.extend([i] * 9)
        assert kv.admit(seq, headroom=0)
        assert seq.keys[:10] == first.keys[:10]
        assert seq.keys[10] != first.keys[10]
    assert len(hashed) == before + 2 * len(others), "the two full blocks that each has of its own"
    kv.check([first, *others])

"""The layout of a flat batch."""

from __future__ import annotations

import torch
from loramux.engine.batch import build_batch
from loramux.engine.kv_cache import KVCache
from loramux.engine.request import AdapterUse
from loramux.engine.scheduler import Row

from .fakes import adapter
from .test_kv_cache import sequence


def test_layout_and_segments() -> None:
    a, b = adapter("a"), adapter("b")
    kv = KVCache(32, 4)
    seqs = [
        sequence([10, 11, 12, 13, 14, 15], b),
        sequence([20, 21]),
        sequence([30, 31, 32], AdapterUse(b, 0.5), AdapterUse(a, 2.0)),
        sequence([40, 41, 42], b),
        sequence([50], AdapterUse(b, -1.0)),
    ]
    for seq in seqs:
        assert kv.admit(seq, headroom=0)
    rows = [Row(seqs[0], 3, 5), Row(seqs[1], 0, 2), Row(seqs[2], 0, 3), Row(seqs[3], 2, 3), Row(seqs[4], 0, 1)]
    batch = build_batch(rows, 4)
    x = batch.inputs
    # base, mix (its uids sorted: a, b), b at -1, b at 1 (in the order given)
    assert [row.sequence for row in batch.rows] == [seqs[1], seqs[2], seqs[4], seqs[0], seqs[3]]
    assert x.token_ids.tolist() == [20, 21, 30, 31, 32, 50, 13, 14, 42]
    assert x.positions.tolist() == [0, 1, 0, 1, 2, 0, 3, 4, 2]
    assert x.query_starts.tolist() == [0, 2, 5, 6, 8, 9]
    assert x.context_lens.tolist() == [2, 3, 1, 5, 3]
    first, second = seqs[0].blocks
    assert x.slots.tolist()[6:8] == [first * 4 + 3, second * 4]
    assert x.block_tables[3].tolist() == [first, second]
    assert x.logits_rows.tolist() == [1, 4, 5, 8], "a chunk that does not end the prompt needs no logits"
    assert batch.sampled == [seqs[1], seqs[2], seqs[4], seqs[3]]
    assert [(s.start, s.stop, s.weight, s.sites) for s in x.segments] == [
        (2, 5, 2.0, a.weights),
        (2, 5, 0.5, b.weights),
        (5, 6, -1.0, b.weights),
        (6, 9, 1.0, b.weights),
    ]
    assert {t.dtype for t in (x.token_ids, x.positions, x.slots, x.logits_rows)} == {torch.int64}
    assert {t.dtype for t in (x.query_starts, x.context_lens, x.block_tables)} == {torch.int32}


def test_the_batch_does_not_see_later_tokens() -> None:
    """Token ids are copied: a sequence grows while its batch may still be on its way to a device."""
    seq = sequence([1, 2, 3])
    kv = KVCache(4, 4)
    assert kv.admit(seq, headroom=0)
    batch = build_batch([Row(seq, 0, 3)], 4)
    seq.tokens.append(9)
    seq.tokens[0] = 7
    assert batch.inputs.token_ids.tolist() == [1, 2, 3]

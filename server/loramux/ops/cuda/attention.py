"""Causal attention over paged keys and values, in Triton.

A program takes one key-value head and a tile of (row, query head) pairs that share it, so that grouped-query attention
reads each key and value once; it walks over the keys with an online softmax (Milakov & Gimelshein 2018, Dao 2023) in
float32, of scores times log₂ e, for exp2. Three ways to cover a batch:

- sequences with one row (decode): a program per sequence, head and part of its context (flash-decoding), then
  `_combine`. The fewer sequences, the more parts.
- sequences with more rows (prefill): a program per tile of rows and head, over all keys that the tile sees.
- invariant: the second with one tile for all; sums of `SPLIT` keys each are merged in order, in registers where a
  program sees the whole context and by `_merge_parts` where it sees one split. It is one compiled kernel for both.

What query_starts, context_lens and block_tables say on the device decides what is computed; the host's numbers bound
the grid only, so that a captured graph serves every batch within its bounds.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux.ops.layout import strided
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch

_LOG2E = tl.constexpr(math.log2(math.e))
# The interpreter's dot of bfloat16 is wrong; there operands go to float32 after they were rounded.
_INTERPRETED = bool(triton.knobs.runtime.interpret)
# Programs of all sequences with one row, over all key-value heads: four for each of 132 multiprocessors.
_PROGRAMS = 528
# Three, so that block numbers come a step before the keys and values that they point to, and these a step before use.
_STAGES = 3
# Keys whose sum is taken before it is merged, where bits must not depend on who takes it.
_SPLIT = 256


@triton.jit
def _tile(
    query_starts,
    context_lens,
    sequences,
    tile,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What a tile of ROWS x GROUP covers → sequence, its rows, the first lane's position; then by lane: row, position,
    whether it is one.

    Sequence s has the tiles from query_starts[s] // ROWS + s to where the next one's begin: enough for its rows
    wherever they start, and found without a table. Lanes that are none have position -1 and see nothing. The first
    lane's position, which is the lowest unless all are none, is no reduction over the lanes: triton 3.7 does not
    pipeline a loop that begins at one.
    """
    sequence = 0
    for first in range(0, sequences, 128):
        s = first + tl.arange(0, 128)
        stops = tl.load(query_starts + s + 1, mask=s < sequences, other=0)
        sequence += tl.sum(((s < sequences) & (stops // ROWS + s + 1 <= tile)).to(tl.int32))
    known = sequence < sequences
    start = tl.load(query_starts + sequence, mask=known, other=0)
    stop = tl.load(query_starts + sequence + 1, mask=known, other=0)
    context = tl.load(context_lens + sequence, mask=known, other=0)
    lane = tl.arange(0, BLOCK_M)
    row0 = start + (tile - start // ROWS - sequence) * ROWS
    row = row0 + lane // GROUP
    live = (lane < ROWS * GROUP) & (row < stop)
    past = context - stop
    return sequence, stop - start, past + row0, row, tl.where(live, past + row, -1), live


@triton.jit
def _clear_rest(
    out,
    query_starts,
    sequences,
    rows,
    tile,
    kv_head,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Zeros for this tile's share of the rows that stand past the last sequence."""
    lane = tl.arange(0, BLOCK_M)
    row = tile * ROWS + lane // GROUP
    rest = (lane < ROWS * GROUP) & (row < rows) & (row >= tl.load(query_starts + sequences))
    line = row.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + lane % GROUP
    v = tl.arange(0, BLOCK_V)
    zeros = tl.zeros([BLOCK_M, BLOCK_V], out.dtype.element_ty)
    tl.store(out + line[:, None] * VALUE_DIM + v[None, :], zeros, mask=rest[:, None] & (v < VALUE_DIM)[None, :])


@triton.jit
def _walk(
    queries,
    position,
    table,
    keys,
    values,
    kv_head,
    begin,
    end,
    scale,
    cap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Over the keys begin … end-1 → (Σ e^(score - highest)·v, highest, Σ e^(score - highest)) of each lane.

    `begin` is a multiple of BLOCK_N. A step in which a lane sees nothing leaves its sums as they were, to the bit.
    """
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    d = tl.arange(0, BLOCK_D)
    w = tl.arange(0, BLOCK_V)
    for at in range(begin, end, BLOCK_N):
        key_at = at + tl.arange(0, BLOCK_N)
        held = key_at < end
        block = tl.load(table + key_at // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
        line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + key_at % BLOCK_SIZE
        # Both at once: where a part is a single step, nothing else keeps the memory busy.
        k = tl.load(keys + line[:, None] * DIM + d[None, :], mask=held[:, None] & (d < DIM)[None, :], other=0.0)
        v = tl.load(
            values + line[:, None] * VALUE_DIM + w[None, :],
            mask=held[:, None] & (w < VALUE_DIM)[None, :],
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            scores = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)
        seen = key_at[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (key_at[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(highest - base)
        shares = tl.exp2(scores - base[:, None])
        weight = weight * fade + tl.sum(shares, 1)
        shares = shares.to(v.dtype)
        if UPCAST:
            shares = shares.to(tl.float32)
            v = v.to(tl.float32)
        total = tl.dot(shares, v, total * fade[:, None], input_precision="ieee")
        highest = higher
    return total, highest, weight


@triton.jit
def _merge(total, highest, weight, other_total, other_highest, other_weight):
    """Sums over some keys and over later ones → over both. One order of operations wherever it is inlined."""
    higher = tl.maximum(highest, other_highest)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp2(highest - base)
    other_fade = tl.exp2(other_highest - base)
    total = tl.fma(total, tl.broadcast_to(fade[:, None], total.shape), other_total * other_fade[:, None])
    return total, higher, tl.fma(weight, fade, other_weight * other_fade)


@triton.jit
def _finish(total, highest, weight, sink, SINKS: tl.constexpr):
    """The softmax's quotient; 0 for lanes that saw nothing. `sink` is an extra logit of each lane."""
    if SINKS:
        total, highest, weight = _merge(total, highest, weight, tl.zeros_like(total), sink, tl.zeros_like(sink) + 1.0)
    return total / tl.where(weight == 0.0, 1.0, weight)[:, None]


@triton.jit
def _parts(context, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """How a sequence with one row is cut: the first key that is read, keys of a part, parts that have some."""
    low = 0
    if WINDOW:
        low = tl.maximum(context - WINDOW, 0) // BLOCK_N * BLOCK_N
    steps = tl.cdiv(context - low, BLOCK_N)
    length = tl.cdiv(steps, PARTS)
    return low, length * BLOCK_N, tl.cdiv(steps, tl.maximum(length, 1))


_UNSPECIALIZED = ("sequences", "rows", "fewest", "launched", "table_stride")
_UNALIGNED = ("query_starts", "context_lens", "block_tables", "sinks")


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def _decode(
    q,
    keys,
    values,
    totals,
    maxima,
    weights,
    query_starts,
    context_lens,
    block_tables,
    launched,
    table_stride,
    q_row_stride,
    q_head_stride,
    scale,
    cap,
    MIXED: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (sequences, kv heads, launched): one part of one sequence, into [sequences, heads, launched, ·]."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    context = tl.load(context_lens + sequence)
    low, length, parts = _parts(context, WINDOW, BLOCK_N, PARTS)
    if part >= parts:
        return
    row = sequence
    if MIXED:
        row = tl.load(query_starts + sequence)
        if tl.load(query_starts + sequence + 1) - row != 1:
            return
    lane = tl.arange(0, BLOCK_M)
    live = lane < GROUP
    head = kv_head * GROUP + lane
    d = tl.arange(0, BLOCK_D)
    queries = tl.load(
        q + row.to(tl.int64) * q_row_stride + head[:, None] * q_head_stride + d[None, :],
        mask=live[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        queries = queries.to(tl.float32)
    begin = low + part * length
    total, highest, weight = _walk(
        queries,
        tl.where(live, context - 1, -1),
        block_tables + sequence.to(tl.int64) * table_stride,
        keys,
        values,
        kv_head,
        begin,
        tl.minimum(begin + length, context),
        scale,
        cap,
        WINDOW,
        SOFTCAP,
        KV_HEADS,
        BLOCK_SIZE,
        DIM,
        VALUE_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
        UPCAST,
    )
    line = (sequence.to(tl.int64) * (KV_HEADS * GROUP) + head) * launched + part
    v = tl.arange(0, BLOCK_V)
    tl.store(totals + line[:, None] * VALUE_DIM + v[None, :], total, mask=live[:, None] & (v < VALUE_DIM)[None, :])
    tl.store(maxima + line, highest, mask=live)
    tl.store(weights + line, weight, mask=live)


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def _combine(
    totals,
    maxima,
    weights,
    sinks,
    out,
    query_starts,
    context_lens,
    launched,
    MIXED: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (sequences, heads): the parts of one head, all loaded at once and summed by one tree of PARTS leaves."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    row = sequence
    if MIXED:
        row = tl.load(query_starts + sequence)
        if tl.load(query_starts + sequence + 1) - row != 1:
            return
    _, _, parts = _parts(tl.load(context_lens + sequence), WINDOW, BLOCK_N, PARTS)
    part = tl.arange(0, PARTS)
    v = tl.arange(0, BLOCK_V)
    line = (sequence.to(tl.int64) * HEADS + head) * launched + part
    highest = tl.load(maxima + line, mask=part < parts, other=float("-inf"))
    weight = tl.load(weights + line, mask=part < parts, other=0.0)
    total = tl.load(
        totals + line[:, None] * VALUE_DIM + v[None, :],
        mask=(part < parts)[:, None] & (v < VALUE_DIM)[None, :],
        other=0.0,
    )
    base = tl.max(highest, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        base = tl.maximum(base, sink)
    base = tl.where(base == float("-inf"), 0.0, base)
    fade = tl.exp2(highest - base)
    divisor = tl.sum(weight * fade, 0)
    if SINKS:
        divisor += tl.exp2(sink - base)
    y = tl.sum(total * fade[:, None], 0) / tl.where(divisor == 0.0, 1.0, divisor)
    line = row.to(tl.int64) * HEADS + head
    tl.store(out + line * VALUE_DIM + v, y.to(out.dtype.element_ty), mask=v < VALUE_DIM)


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def _prefill(
    q,
    keys,
    values,
    sinks,
    out,
    query_starts,
    context_lens,
    block_tables,
    sequences,
    rows,
    fewest,
    table_stride,
    q_row_stride,
    q_head_stride,
    scale,
    cap,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles, kv heads): all keys of one tile, of sequences with at least `fewest` rows."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    _clear_rest(out, query_starts, sequences, rows, tile, kv_head, ROWS, GROUP, KV_HEADS, VALUE_DIM, BLOCK_M, BLOCK_V)
    sequence, own, oldest, row, position, live = _tile(
        query_starts, context_lens, sequences, tile, ROWS, GROUP, BLOCK_M
    )
    live = live & (own >= fewest)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    lane = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + lane % GROUP
    d = tl.arange(0, BLOCK_D)
    queries = tl.load(
        q + row.to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + d[None, :],
        mask=live[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        queries = queries.to(tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(oldest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    total, highest, weight = _walk(
        queries,
        position,
        block_tables + sequence.to(tl.int64) * table_stride,
        keys,
        values,
        kv_head,
        low,
        tl.max(position, 0) + 1,
        scale,
        cap,
        WINDOW,
        SOFTCAP,
        KV_HEADS,
        BLOCK_SIZE,
        DIM,
        VALUE_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
        UPCAST,
    )
    sink = highest
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
    y = _finish(total, highest, weight, sink, SINKS)
    line = row.to(tl.int64) * (KV_HEADS * GROUP) + head
    v = tl.arange(0, BLOCK_V)
    tl.store(
        out + line[:, None] * VALUE_DIM + v[None, :],
        y.to(out.dtype.element_ty),
        mask=live[:, None] & (v < VALUE_DIM)[None, :],
    )


@triton.jit
def _splits(oldest, position, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    """The splits that a tile sees: the first, and where they end."""
    first = 0
    if WINDOW:
        first = tl.maximum(oldest - WINDOW + 1, 0) // SPLIT
    return first, tl.cdiv(tl.max(position, 0) + 1, SPLIT)


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def _invariant(
    q,
    keys,
    values,
    totals,
    maxima,
    weights,
    query_starts,
    context_lens,
    block_tables,
    sequences,
    launched,
    table_stride,
    q_row_stride,
    q_head_stride,
    scale,
    cap,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles, kv heads, launched): one split of a tile each, or if one is launched all; into [rows, heads,
    launched, ·]."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    sequence, _, oldest, row, position, live = _tile(query_starts, context_lens, sequences, tile, ROWS, GROUP, BLOCK_M)
    first, stop = _splits(oldest, position, WINDOW, SPLIT)
    if launched > 1:
        first += part
        stop = tl.minimum(stop, first + 1)
    if first >= stop:
        return
    lane = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + lane % GROUP
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    queries = tl.load(
        q + row.to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + d[None, :],
        mask=live[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        queries = queries.to(tl.float32)
    end = tl.max(position, 0) + 1
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    for split in range(first, stop):
        other_total, other_highest, other_weight = _walk(
            queries,
            position,
            block_tables + sequence.to(tl.int64) * table_stride,
            keys,
            values,
            kv_head,
            split * SPLIT,
            tl.minimum(split * SPLIT + SPLIT, end),
            scale,
            cap,
            WINDOW,
            SOFTCAP,
            KV_HEADS,
            BLOCK_SIZE,
            DIM,
            VALUE_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
            UPCAST,
        )
        total, highest, weight = _merge(total, highest, weight, other_total, other_highest, other_weight)
    line = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * launched + part
    tl.store(totals + line[:, None] * VALUE_DIM + v[None, :], total, mask=live[:, None] & (v < VALUE_DIM)[None, :])
    tl.store(maxima + line, highest, mask=live)
    tl.store(weights + line, weight, mask=live)


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def _merge_parts(
    totals,
    maxima,
    weights,
    sinks,
    out,
    query_starts,
    context_lens,
    sequences,
    rows,
    launched,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles, kv heads): what `_invariant` left, merged in order as it merges in registers."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    _clear_rest(out, query_starts, sequences, rows, tile, kv_head, ROWS, GROUP, KV_HEADS, VALUE_DIM, BLOCK_M, BLOCK_V)
    _, _, oldest, row, position, live = _tile(query_starts, context_lens, sequences, tile, ROWS, GROUP, BLOCK_M)
    first, stop = _splits(oldest, position, WINDOW, SPLIT)
    lane = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + lane % GROUP
    line = row.to(tl.int64) * (KV_HEADS * GROUP) + head
    v = tl.arange(0, BLOCK_V)
    mask = live[:, None] & (v < VALUE_DIM)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.range(0, tl.minimum(stop - first, launched), num_stages=STAGES):
        at = line * launched + part
        total, highest, weight = _merge(
            total,
            highest,
            weight,
            tl.load(totals + at[:, None] * VALUE_DIM + v[None, :], mask=mask, other=0.0),
            tl.load(maxima + at, mask=live, other=float("-inf")),
            tl.load(weights + at, mask=live, other=0.0),
        )
    sink = highest
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
    y = _finish(total, highest, weight, sink, SINKS)
    tl.store(out + line[:, None] * VALUE_DIM + v[None, :], y.to(out.dtype.element_ty), mask=mask)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache,
    batch: PagedBatch,
    shape: AttentionShape,
    *,
    invariant: bool = False,
) -> Tensor:
    """Causal attention of each row over its own sequence: q [T, H, D] → [T, H, D_v], contiguous, in q's dtype.

    q, k [T, H_kv, D] and v [T, H_kv, D_v] are rotated, and k and v are in `cache` already, where they are read; all
    in the cache's dtype (bfloat16, float16 or float32), the last dimension of q contiguous. query_starts,
    context_lens and block_tables lie on q's device, int32, and are the truth; batch.starts and batch.contexts are upper
    bounds of them. T equal to the number of sequences means one row each: row s is sequence s's then.
    A sequence whose context_len is 0, and a row that is no sequence's, get zeros, and nothing is read for them.

    invariant: a row's bits depend on its own sequence alone, and not on how it was chunked or batched.
    """
    rows, heads, dim = q.shape
    _, kv_heads, _, value_dim = cache.values.shape
    assert heads % kv_heads == 0
    assert strided(q, 2, 1)
    assert q.dtype == cache.keys.dtype == cache.values.dtype
    assert cache.keys.is_contiguous()
    assert cache.values.is_contiguous()
    assert k.shape[1:] == (kv_heads, dim)
    assert v.shape[1:] == (kv_heads, value_dim)
    out = q.new_empty(rows, heads, value_dim)
    if not rows:
        return out
    call = _Call(q, out, cache, batch, shape)
    if invariant:
        call.invariant()
        return out
    if rows == batch.context_lens.shape[0]:
        call.decode(mixed=False)
        return out
    singles = any(stop - start == 1 for start, stop in pairwise(batch.starts))
    if singles:
        call.decode(mixed=True)
    call.prefill(fewest=2 if singles else 1)
    return out


class _Call:
    """One call's arguments and tile shapes, for its launches.

    No shape depends on the batch.
    """

    def __init__(self, q: Tensor, out: Tensor, cache: LayerCache, batch: PagedBatch, shape: AttentionShape) -> None:
        self.rows, self.heads, dim = q.shape
        _, self.kv_heads, block_size, self.value_dim = cache.values.shape
        self.group = self.heads // self.kv_heads
        self.sequences = batch.context_lens.shape[0]
        self.window = shape.sliding_window or 0
        self.widest = max(batch.contexts, default=0)
        self.q, self.out, self.cache, self.batch = q, out, cache, batch
        self.sinks = out if shape.sinks is None else shape.sinks
        self.block_d, self.block_v = (max(16, triton.next_power_of_2(n)) for n in (dim, self.value_dim))
        self.width = (self.block_d + self.block_v) * q.element_size()  # bytes of a key and its value
        self.step = min(64, max(16, triton.next_power_of_2(32768 // self.width)))
        if shape.softcap is None:
            scale, cap = shape.scaling * _LOG2E.value, 0.0
        else:
            scale, cap = shape.scaling / shape.softcap * 2 * _LOG2E.value, shape.softcap * _LOG2E.value
        self.strides = (batch.block_tables.stride(0), q.stride(0), q.stride(1), scale, cap)
        self.constants: dict[str, Any] = {
            "GROUP": self.group,
            "WINDOW": self.window,
            "SOFTCAP": shape.softcap is not None,
            "KV_HEADS": self.kv_heads,
            "BLOCK_SIZE": block_size,
            "DIM": dim,
            "VALUE_DIM": self.value_dim,
            "BLOCK_D": self.block_d,
            "BLOCK_V": self.block_v,
            "UPCAST": _INTERPRETED and q.dtype == torch.bfloat16,
        }
        self.with_sinks = shape.sinks is not None

    def decode(self, *, mixed: bool) -> None:
        """The sequences with one row; mixed: there are others."""
        # Few heads need small parts, so that a short context still gives work to every multiprocessor.
        step = self.step if self.kv_heads >= 8 else min(32, self.step)
        # Beside prompts the device is full anyhow; there one constant will do.
        wanted = max(1, _PROGRAMS // (self.kv_heads * (4 if mixed else self.sequences)))
        parts = min(64, 1 << wanted.bit_length() - 1)
        launched = max(1, min(parts, self._units(step)))
        scratch = self._scratch(self.sequences, launched)
        b = self.batch
        flags = {"MIXED": mixed, "PARTS": parts, "WINDOW": self.window, "BLOCK_N": step}
        _decode[(self.sequences, self.kv_heads, launched)](
            self.q,
            self.cache.keys,
            self.cache.values,
            *scratch,
            b.query_starts,
            b.context_lens,
            b.block_tables,
            launched,
            *self.strides,
            BLOCK_M=max(16, triton.next_power_of_2(self.group)),
            num_warps=4,
            num_stages=_STAGES,
            **{**self.constants, **flags},
        )
        _combine[(self.sequences, self.heads)](
            *scratch,
            self.sinks,
            self.out,
            b.query_starts,
            b.context_lens,
            launched,
            HEADS=self.heads,
            SINKS=self.with_sinks,
            VALUE_DIM=self.value_dim,
            BLOCK_V=self.block_v,
            num_warps=8 if parts * self.block_v > 4096 else 4,
            **flags,
        )

    def prefill(self, *, fewest: int) -> None:
        """The sequences with at least so many rows, and the rows that are no sequence's."""
        tile = max(128 if self.width <= 512 else 64, triton.next_power_of_2(self.group))
        b = self.batch
        _prefill[(self._tiles(tile), self.kv_heads)](
            self.q,
            self.cache.keys,
            self.cache.values,
            self.sinks,
            self.out,
            b.query_starts,
            b.context_lens,
            b.block_tables,
            self.sequences,
            self.rows,
            fewest,
            *self.strides,
            ROWS=tile // self.group,
            SINKS=self.with_sinks,
            BLOCK_M=tile,
            BLOCK_N=self.step,
            num_warps=8 if tile >= 128 else 4,
            num_stages=_STAGES,
            **self.constants,
        )

    def invariant(self) -> None:
        """All rows, by one kernel."""
        tile = max(64, triton.next_power_of_2(self.group))
        one_each = self.rows == self.sequences
        launched = max(1, self._units(_SPLIT)) if one_each else 1
        scratch = self._scratch(self.rows, launched)
        b = self.batch
        flags = {"ROWS": tile // self.group, "SPLIT": _SPLIT, "BLOCK_M": tile}
        _invariant[(self._tiles(tile), self.kv_heads, launched)](
            self.q,
            self.cache.keys,
            self.cache.values,
            *scratch,
            b.query_starts,
            b.context_lens,
            b.block_tables,
            self.sequences,
            launched,
            *self.strides,
            BLOCK_N=self.step,
            num_warps=8 if self.block_v >= 128 else 4,
            num_stages=_STAGES,
            **flags,
            **self.constants,
        )
        _merge_parts[(self._tiles(tile), self.kv_heads)](
            *scratch,
            self.sinks,
            self.out,
            b.query_starts,
            b.context_lens,
            self.sequences,
            self.rows,
            launched,
            GROUP=self.group,
            WINDOW=self.window,
            SINKS=self.with_sinks,
            KV_HEADS=self.kv_heads,
            VALUE_DIM=self.value_dim,
            BLOCK_V=self.block_v,
            # A part in float32 on its way is all that an SM of 8.6 has, where heads are 512 wide.
            STAGES=2 if tile * self.block_v <= 64 * 256 else 1,
            num_warps=8,
            **flags,
        )

    def _units(self, unit: int) -> int:
        """Most pieces of `unit` keys, aligned to it, that a row sees."""
        seen = self.widest
        if self.window:
            seen = min(seen, self.window + unit - 1)
        return -(-seen // unit)

    def _tiles(self, tile: int) -> int:
        """Tiles of that many lanes that the batch can have; see `_tile`."""
        return -(-self.rows // (tile // self.group)) + self.sequences

    def _scratch(self, lines: int, launched: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each line, head and part: Σ weight·v, the highest score and Σ weight."""
        shape = (lines, self.heads, launched)
        new = partial(torch.empty, dtype=torch.float32, device=self.q.device)
        return new(*shape, self.value_dim), new(shape), new(shape)

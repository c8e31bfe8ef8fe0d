"""Triton's attention against the reference: on a CUDA device if there is one, else in Triton's interpreter.

Whatever memory attention gets is NaN at first, and so is all of the cache that no sequence holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loramux.ops.cuda import attention as module
from loramux.ops.cuda.attention import attention
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.reference import ReferenceBackend

from tests.ops.triton_device import DEVICE, EXAMPLES, sum_all_rows_alike

REFERENCE = ReferenceBackend()
BF16 = torch.bfloat16


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Heads:
    """The shape of a layer."""

    kv_heads: int = 2
    group: int = 2
    dim: int = 64
    value_dim: int = 64
    block: int = 16


class Case:
    """Sequences with their queries at all positions, and a cache that holds their keys and values, out of order."""

    def __init__(
        self,
        heads: Heads,
        lengths: list[int],
        dtype: torch.dtype = BF16,
        seed: int = 0,
        shape: AttentionShape | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.heads, self.lengths = heads, lengths
        self.shape = shape or AttentionShape(heads.dim**-0.5)
        tables = [-(-n // heads.block) for n in lengths]
        blocks = sum(tables) + 3
        self.cache = LayerCache.allocate(
            blocks, heads.block, heads.kv_heads, heads.dim, heads.value_dim, dtype, torch.device("cpu")
        )
        self.cache.keys.fill_(torch.nan)
        self.cache.values.fill_(torch.nan)
        order = torch.randperm(blocks, generator=g)
        self.tables = torch.full((len(lengths), max(tables, default=0) + 1), -7, dtype=torch.int32)
        self.queries = []
        taken = 0
        for s, (n, held) in enumerate(zip(lengths, tables, strict=True)):
            own = order[taken : taken + held]
            taken += held
            self.tables[s, :held] = own
            at = torch.arange(n)
            slots = own[at // heads.block] * heads.block + at % heads.block
            k = torch.randn(n, heads.kv_heads, heads.dim, generator=g).to(dtype)
            v = torch.randn(n, heads.kv_heads, heads.value_dim, generator=g).to(dtype)
            self.cache.write(slots, k, v)
            self.queries.append(torch.randn(n, heads.kv_heads * heads.group, heads.dim, generator=g).to(dtype))
        self.cache = LayerCache(self.cache.keys.to(DEVICE), self.cache.values.to(DEVICE))

    def run(
        self,
        chunks: list[tuple[int, int, int]],
        *,
        invariant: bool = False,
        idle: tuple[int, ...] = (),
        rest: int = 0,
        slack: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of chunks (sequence, from, to) → what was computed and what is right, [T, H, D_v].

        idle: rows of sequences without context that follow; rest: rows of no sequence after those; slack: by how much
        the bounds exceed the truth.
        """
        heads = self.heads
        q = torch.cat([self.queries[s][first:stop] for s, first, stop in chunks])
        filler = torch.full((sum(idle) + rest, *q.shape[1:]), torch.nan, dtype=q.dtype)
        # Strided, as queries are that were a part of a wider product.
        wide = torch.full((len(q) + len(filler), q.shape[1] + 2, heads.dim), torch.nan, dtype=q.dtype)
        wide[:, :-2] = torch.cat((q, filler))
        starts, contexts = [0], []
        for _, first, stop in chunks:
            starts.append(starts[-1] + stop - first)
            contexts.append(stop)
        truth = PagedBatch(
            torch.empty(0, dtype=torch.int64, device=DEVICE),
            torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
            self.tables[[s for s, _, _ in chunks]].to(DEVICE),
            tuple(starts),
            tuple(contexts),
        )
        none = torch.empty(0, heads.kv_heads, heads.dim, dtype=q.dtype, device=DEVICE)
        none_v = torch.empty(0, heads.kv_heads, heads.value_dim, dtype=q.dtype, device=DEVICE)
        shape = self.shape if self.shape.sinks is None else replace(self.shape, sinks=self.shape.sinks.to(DEVICE))
        expected = REFERENCE.attention(q.to(DEVICE), none, none_v, self.cache, truth, shape)
        expected = torch.cat((expected, expected.new_zeros(len(filler), *expected.shape[1:])))
        for rows in idle:
            starts.append(starts[-1] + rows)
            contexts.append(0)
        bounds = [*starts[:-1], starts[-1] + rest]
        batch = PagedBatch(
            truth.slots,
            torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
            torch.cat((truth.block_tables, truth.block_tables.new_full((len(idle), self.tables.shape[1]), -7))),
            tuple(bounds),
            tuple(n + slack for n in contexts),
        )
        with poisoned_memory():
            got = attention(wide.to(DEVICE)[:, :-2], none, none_v, self.cache, batch, shape, invariant=invariant)
        return got, expected


def close(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Asserts that both agree as far as their dtype lets them; returns the first."""
    got, expected = pair
    assert got.is_contiguous()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if got.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got, expected, **tolerance)
    return got


def shapes(heads: int) -> st.SearchStrategy[AttentionShape]:
    return st.builds(
        AttentionShape,
        scaling=st.just(0.125),
        sliding_window=st.sampled_from([None, 1, 7, 40, 64, 300]),
        softcap=st.sampled_from([None, 2.0, 50.0]),
        sinks=st.sampled_from([None, torch.linspace(-2, 3, heads), torch.linspace(-1, 1, heads).to(BF16)]),
    )


HEADS = st.sampled_from(
    [
        Heads(2, 1, 64, 64),
        Heads(1, 3, 80, 80),
        Heads(2, 4, 128, 128),
        Heads(1, 8, 64, 64, block=32),
        Heads(1, 2, 40, 24, block=4),
        Heads(8, 1, 96, 128),
        Heads(1, 20, 64, 64),
    ]
)
DTYPES = st.sampled_from([torch.float32, BF16, torch.float16])


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_decode(data: st.DataObject) -> None:
    """One row a sequence, padding behind them as a graph has it: with a row each, or with none and rows of no one."""
    heads = data.draw(HEADS)
    lengths = data.draw(st.lists(st.one_of(st.integers(1, 70), st.integers(1, 700)), min_size=1, max_size=3))
    shape = data.draw(shapes(heads.kv_heads * heads.group))
    case = Case(heads, lengths, data.draw(DTYPES), data.draw(st.integers(0, 99)), shape)
    padding = data.draw(st.integers(0, 2))
    empty = data.draw(st.booleans())
    close(
        case.run(
            [(s, n - 1, n) for s, n in enumerate(lengths)],
            idle=(0 if empty else 1,) * padding,
            rest=padding if empty else 0,
            slack=data.draw(st.sampled_from([0, 1, 500])),
            invariant=data.draw(st.booleans()),
        )
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_mixed_batches(data: st.DataObject) -> None:
    heads = data.draw(HEADS)
    chunks = []
    for s in range(data.draw(st.integers(1, 4))):
        cached = data.draw(st.one_of(st.just(0), st.integers(0, 300)))
        chunks.append((s, cached, cached + data.draw(st.one_of(st.just(1), st.integers(1, 50)))))
    shape = data.draw(shapes(heads.kv_heads * heads.group))
    case = Case(heads, [stop for _, _, stop in chunks], data.draw(DTYPES), data.draw(st.integers(0, 99)), shape)
    close(
        case.run(
            chunks,
            idle=data.draw(st.sampled_from([(), (0, 3), (1,)])),
            rest=data.draw(st.sampled_from([0, 1, 150])),
            slack=data.draw(st.sampled_from([0, 77])),
            invariant=data.draw(st.booleans()),
        )
    )


def test_bounds_may_say_more_rows_than_there_are() -> None:
    """The host's bound is a chunk; on the device the sequence has one row of it."""
    case = Case(Heads(), [40])
    q = case.queries[0][37:].to(DEVICE)
    none = q.new_empty(0, 2, 64)
    batch = PagedBatch(
        torch.empty(0, dtype=torch.int64, device=DEVICE),
        torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        torch.tensor([38], dtype=torch.int32, device=DEVICE),
        case.tables.to(DEVICE),
        (0, 3),
        (40,),
    )
    with poisoned_memory():
        got = attention(q, none, none, case.cache, batch, case.shape)
    torch.testing.assert_close(got[:1], case.run([(0, 37, 38)])[1], rtol=2e-2, atol=2e-2)
    assert not got[1:].any()


LONG = [530, 70, 90]
VARIANTS = [
    AttentionShape(0.125),
    AttentionShape(0.125, sliding_window=100, softcap=20.0, sinks=torch.linspace(-2, 3, 3)),
]


@pytest.mark.parametrize("shape", VARIANTS, ids=["plain", "all"])
def test_invariant(monkeypatch: pytest.MonkeyPatch, shape: AttentionShape) -> None:
    """The same bits alone, in a batch, whole, by chunks, and row by row; over more than one split."""
    sum_all_rows_alike(monkeypatch)
    case = Case(Heads(1, 3, 80, 64), LONG, shape=shape)
    whole = close(case.run([(s, 0, n) for s, n in enumerate(LONG)], invariant=True))
    chunk = close(case.run([(1, 60, 70), (0, 250, 300)], invariant=True, rest=3))
    assert torch.equal(chunk[10:60], whole[250:300])
    assert torch.equal(chunk[:10], whole[590:600])
    for position in (255, 256, 529):
        single = close(case.run([(0, position, position + 1)], invariant=True))
        company = close(case.run([(2, 89, 90), (0, position, position + 1)], invariant=True, idle=(1,), slack=700))
        assert torch.equal(single[0], whole[position])
        assert torch.equal(company[1], whole[position])
        assert torch.equal(company[0], whole[-1])


@pytest.mark.parametrize("shape", VARIANTS, ids=["plain", "all"])
def test_decoded_rows_do_not_depend_on_the_others(shape: AttentionShape) -> None:
    case = Case(Heads(1, 3, 80, 64), LONG, shape=shape)
    alone = close(case.run([(0, 529, 530)]))[0]
    together = close(case.run([(1, 4, 5), (0, 529, 530), (2, 89, 90)], slack=1000))
    beside = close(case.run([(1, 0, 20), (0, 529, 530)]))
    assert torch.equal(together[1], alone)
    assert torch.equal(beside[20], alone)


def test_more_keys_than_parts_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen parts of 32 keys are 512; longer contexts get longer parts, of which the last ones may be empty."""
    monkeypatch.setattr(module, "_PROGRAMS", 16)
    for context in (511, 512, 513, 560, 1100):
        case = Case(Heads(1, 2, 16, 16), [context], torch.float32)
        close(case.run([(0, context - 1, context)]))


def test_no_rows() -> None:
    case = Case(Heads(), [3])
    assert attention(
        torch.empty(0, 4, 64, dtype=BF16, device=DEVICE),
        *(torch.empty(0, 2, 64, dtype=BF16, device=DEVICE),) * 2,
        case.cache,
        PagedBatch(*(torch.empty(0, dtype=torch.int32, device=DEVICE),) * 4, (0,), ()),
        case.shape,
    ).shape == (0, 4, 64)


@pytest.mark.parametrize(("capability", "shared", "spilled"), [(80, 99 * 1024, 256), (90, 99 * 1024, 0)])
def test_every_kernel_compiles(capability: int, shared: int, spilled: int) -> None:
    """In a process of its own, since here kernels are interpreted. 99 KB is what the least of cards has.

    Keys and values travel 16 bytes at a time, without a stop in registers.
    """
    found = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_attention", str(capability)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert {line[1] for line in lines} == {"_decode", "_combine", "_prefill", "_invariant", "_merge_parts"}
    for _, kernel, _, local, used, copies in lines:
        assert int(local) <= spilled, found.stdout
        assert int(used) <= shared, found.stdout
        assert int(copies) >= 8 or kernel not in ("_decode", "_prefill", "_invariant"), found.stdout


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("invariant", [False, True])
def test_a_captured_graph_follows_what_is_on_the_device(invariant: bool) -> None:
    lengths = [900, 30, 400]
    case = Case(Heads(), lengths)
    q = torch.stack([queries[-1] for queries in case.queries]).to(DEVICE)
    none = q.new_empty(0, 2, 64)
    starts = torch.arange(4, dtype=torch.int32, device=DEVICE)
    contexts = torch.ones(3, dtype=torch.int32, device=DEVICE)
    tables = case.tables.to(DEVICE)
    batch = PagedBatch(torch.empty(0), starts, contexts, tables, (0, 1, 2, 3), (1024,) * 3)

    def run() -> torch.Tensor:
        return attention(q, none, none, case.cache, batch, case.shape, invariant=invariant)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for now in (lengths, [17, 0, 399]):
        contexts.copy_(torch.tensor(now, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, run())
        assert not now[1] or torch.isfinite(out).all()

"""Every backend against the reference, over random shapes, ranks, mixes and base rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loramux.ops.backend import Backend, LinearPart, SiteSegment
from loramux.ops.grouped import GroupedBackend
from loramux.ops.nf4 import NF4Weight
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.reference import ReferenceBackend
from loramux.ops.segment import LoraWeights

BACKENDS: list[Backend] = [GroupedBackend()]
REFERENCE = ReferenceBackend()


def lora(
    rank: int, k: int, n: int, bias: bool, generator: torch.Generator, dtype: torch.dtype, scaled: bool = False
) -> LoraWeights:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    scale = torch.randn(n, generator=generator) if scaled else None
    return LoraWeights(draw(rank, k) / k**0.5, draw(n, rank) / rank**0.5, draw(n) if bias else None, scale)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_linear(backend: Backend, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    rows = data.draw(st.sampled_from([1, 2, 5, 16, 33]))
    k = data.draw(st.sampled_from([64, 80, 128]))
    widths = data.draw(st.lists(st.sampled_from([16, 48, 100]), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    parts = [
        LinearPart(
            NF4Weight.quantize(torch.randn(n, k, generator=g) / k**0.5),
            torch.randn(n, generator=g).to(dtype) if data.draw(st.booleans()) else None,
        )
        for n in widths
    ]
    segments = []
    # Rows of segments with a scale are in no other; the rest may overlap.
    shared = data.draw(st.integers(0, rows))
    for scaled in sorted(data.draw(st.lists(st.booleans(), max_size=5))):
        first, last = (shared, rows) if scaled else (0, shared)
        start = data.draw(st.integers(first, last))
        stop = data.draw(st.integers(start, last))  # empty segments included
        shared = stop if scaled else shared
        rank = data.draw(st.sampled_from([1, 3, 8, 40]))
        factors = tuple(
            lora(rank, k, n, data.draw(st.booleans()), g, dtype, scaled) if data.draw(st.booleans()) else None
            for n in widths
        )
        segments.append(SiteSegment(start, stop, data.draw(st.sampled_from([1.0, -0.5, 0.25])), factors))
    x = torch.randn(rows, k, generator=g).to(dtype)
    before = x.clone()
    expected = REFERENCE.linear(x, parts, segments)
    got = backend.linear(x, parts, segments)
    assert torch.equal(x, before)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 8e-2}
    for y, e in zip(got, expected, strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y, e, **tolerance)


@pytest.mark.parametrize("backend", [*BACKENDS, REFERENCE], ids=lambda b: b.name)
def test_base_rows_get_no_adapter(backend: Backend) -> None:
    """vLLM on CPU gave base rows of a mixed batch an adapter's delta, because index -1 wraps (#48421)."""
    g = torch.Generator().manual_seed(1)
    parts = [LinearPart(NF4Weight.quantize(torch.randn(32, 64, generator=g)))]
    x = torch.randn(4, 64, generator=g)
    segment = SiteSegment(1, 3, 1.0, (lora(8, 64, 32, True, g, torch.float32, scaled=True),))
    (plain,), (mixed,) = backend.linear(x, parts, []), backend.linear(x, parts, [segment])
    assert torch.equal(plain[[0, 3]], mixed[[0, 3]])
    assert not torch.isclose(plain[[1, 2]], mixed[[1, 2]]).all(dim=1).any()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_attention(backend: Backend, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    kv_heads, groups, dim = data.draw(st.sampled_from([(1, 4, 16), (2, 3, 8), (3, 1, 32)]))
    block, blocks = data.draw(st.sampled_from([(4, 40), (16, 16)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    shape = AttentionShape(
        scaling=dim**-0.5,
        sliding_window=data.draw(st.sampled_from([None, 3, 20])),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        sinks=torch.randn(kv_heads * groups, generator=g) if data.draw(st.booleans()) else None,
    )
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=4))
    cache = LayerCache.allocate(blocks, block, kv_heads, dim, dim, dtype, torch.device("cpu"))
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=g))
    cache.values.copy_(torch.randn(cache.values.shape, generator=g))
    free = torch.randperm(blocks, generator=g).tolist()
    starts, contexts, slots, tables = [0], [], [], []
    for cached, new in lengths:
        table = [free.pop() for _ in range(-(-(cached + new) // block))]
        slots += [table[p // block] * block + p % block for p in range(cached, cached + new)]
        starts.append(starts[-1] + new)
        contexts.append(cached + new)
        tables.append(table)
    width = max(map(len, tables))
    batch = PagedBatch(
        torch.tensor(slots),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        torch.tensor([t + [-1] * (width - len(t)) for t in tables], dtype=torch.int32),
        tuple(starts),
        tuple(contexts),
    )
    q = torch.randn(starts[-1], kv_heads * groups, dim, generator=g).to(dtype)
    k = torch.randn(starts[-1], kv_heads, dim, generator=g).to(dtype)
    v = torch.randn(starts[-1], kv_heads, dim, generator=g).to(dtype)
    other = LayerCache(cache.keys.clone(), cache.values.clone())
    expected = REFERENCE.attention(q, k, v, other, batch, shape)
    got = backend.attention(q, k, v, cache, batch, shape)
    assert torch.equal(cache.keys, other.keys)
    assert torch.equal(cache.values, other.values)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(got, expected, **tolerance)

"""The native CPU kernels against the reference, each instruction set forced, over random shapes, ranks and mixes.

And the promise that a request's bits do not depend on its company: every operation computes a row alone exactly as it
computes it in any batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes import functional as bnb
from loramux.ops.backend import BoundSegments, Linear, LinearPart, SiteSegment
from loramux.ops.cpu.backend import NativeBackend, NativeLinear
from loramux.ops.cpu.build import supported_isas
from loramux.ops.cpu.packed import PackedNF4
from loramux.ops.nf4 import NF4Weight
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.reference import ReferenceBackend
from loramux.ops.segment import AdapterWeights, LoraWeights, Segment

REFERENCE = ReferenceBackend()
BF16 = torch.bfloat16
RANKS = (1, 2, 3, 8, 16, 17, 31, 32, 40, 64, 200, 256)


@pytest.fixture(params=[(isa, threads) for isa in supported_isas() for threads in (1, 2)], ids=str)
def native(request: pytest.FixtureRequest) -> Iterator[NativeBackend]:
    isa, threads = request.param
    yield NativeBackend(isa, threads)
    NativeBackend()  # what the other tests of this process expect


class Case:
    """Random parts and segments, for the reference and for the kernels."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.g = torch.Generator().manual_seed(seed)
        self.rows = self.choose.choice([1, 2, 5, 16, 17, 33, 70, 200])
        self.k = self.choose.choice([64, 128, 576])
        self.widths = [self.choose.choice([16, 48, 100, 5, 192]) for _ in range(self.choose.randint(1, 3))]
        self.parts = [self.part(n) for n in self.widths]
        self.plain: list[SiteSegment] = []
        self.segments: list[Segment] = []
        # Rows of segments with a scale are in no other; the rest may overlap.
        shared = self.choose.randint(0, self.rows)
        for _ in range(self.choose.randint(0, 5)):
            self.add_segment(0, shared, scaled=False)
        while shared < self.rows and self.choose.random() < 0.8:
            shared = self.add_segment(shared, self.rows, scaled=True)
        self.x = self.draw(self.rows, self.k).to(BF16)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.g)

    def part(self, n: int) -> LinearPart:
        bias = self.draw(n).to(BF16) if self.choose.random() < 0.5 else None
        return LinearPart(NF4Weight.quantize(self.draw(n, self.k) / self.k**0.5), bias)

    def add_segment(self, first: int, last: int, *, scaled: bool) -> int:
        """A segment within these rows; returns where it ends."""
        start = self.choose.randint(first, last)
        stop = self.choose.randint(start, last)  # empty ones included
        weight = self.choose.choice([1.0, -0.5, 0.25])
        rank = self.choose.choice(RANKS)
        factors: list[LoraWeights | None] = []
        for n in self.widths:
            a, b = (self.draw(rank, self.k) / self.k**0.5).to(BF16), (self.draw(n, rank) / rank**0.5).to(BF16)
            bias = self.draw(n).to(BF16) if self.choose.random() < 0.3 else None
            scale = self.draw(n) if scaled and self.choose.random() < 0.8 else None
            factors.append(LoraWeights(a, b, bias, scale) if self.choose.random() < 0.7 else None)
        self.plain.append(SiteSegment(start, stop, weight, tuple(factors)))
        self.segments.append(Segment(start, stop, weight, flat(factors)))
        return stop


def flat(factors: list[LoraWeights | None]) -> AdapterWeights:
    """One buffer of exactly the factors, each at a multiple of 64 bytes, as lora.adapter lays them out."""
    offsets = torch.full((len(factors), 4), -1, dtype=torch.int64)
    ranks = torch.zeros(len(factors), dtype=torch.int32)
    chunks = [torch.empty(0, dtype=BF16)]
    at = 0
    for site, lora in enumerate(factors):
        if lora is None:
            continue
        ranks[site] = lora.a.shape[0]
        for i, tensor in enumerate((lora.a, lora.b, lora.bias, lora.scale)):
            if tensor is not None:
                elements = tensor.flatten().view(BF16)
                offsets[site, i] = at
                chunks += [elements, torch.zeros(-elements.numel() % 32, dtype=BF16)]
                at += chunks[-2].numel() + chunks[-1].numel()
    return AdapterWeights(torch.cat(chunks), offsets, ranks, {i: f for i, f in enumerate(factors) if f is not None})


def run(linear: Linear, native: NativeBackend, x: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    bound: BoundSegments = native.bind(tuple(segments))
    return torch.cat(linear(x, bound), dim=1)


@pytest.mark.parametrize("seed", range(40))
def test_linear(native: NativeBackend, seed: int) -> None:
    case = Case(seed)
    linear = native.prepare(case.parts, range(len(case.parts)))
    assert isinstance(linear, NativeLinear)
    before = case.x.clone()
    got = run(linear, native, case.x, case.segments)
    assert torch.equal(case.x, before)
    expected = torch.cat(REFERENCE.linear(case.x.float(), case.parts, case.plain), dim=1)
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)
    for row in {0, case.rows - 1, case.choose.randrange(case.rows)}:
        own = [Segment(0, 1, s.weight, s.sites) for s in case.segments if s.start <= row < s.stop]
        assert torch.equal(run(linear, native, case.x[row : row + 1], own)[0], got[row]), f"row {row} alone differs"


@pytest.mark.parametrize("double", [True, False])
def test_weights_are_the_ones_bitsandbytes_dequantizes_to(native: NativeBackend, double: bool) -> None:
    """Unit inputs read single weights out of the kernel.

    Tiles multiply those values, to the bit. Vectors multiply multiples of 1/8192 of the absmax, and round the result.
    """
    values = torch.randn(48, 128, generator=torch.Generator().manual_seed(3))
    codes, state = bnb.quantize_4bit(values, blocksize=64, compress_statistics=double, quant_type="nf4")
    weight = NF4Weight.from_checkpoint(codes, state.as_dict(packed=True))
    linear = native.prepare([LinearPart(weight)], [0])
    got = run(linear, native, torch.eye(128, dtype=BF16), []).T
    if native.isa == "amx":
        assert torch.equal(got, weight.dequantize(BF16))
        return
    exact = weight.dequantize(torch.float32)
    absmax = exact.view(-1, 64).abs().amax(dim=1, keepdim=True).expand(-1, 64).reshape(48, 128)
    assert ((got.float() - exact).abs() <= absmax / 16384 * 1.001 + exact.abs() / 256).all()


def errors(native: NativeBackend, x: torch.Tensor, weight: NF4Weight) -> tuple[float, float, float]:
    """Root mean squares: of the kernel's errors, of those of a matmul with weights dequantized to bf16 (the usual
    way), and of those that rounding the exact result to bf16 makes."""
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    usual = x.float() @ weight.dequantize(BF16).float().T
    found = run(native.prepare([LinearPart(weight)], [0]), native, x, [])
    mine, other, rounding = ((y.to(BF16).double() - exact).square().mean().sqrt() for y in (found, usual, exact))
    return float(mine), float(other), float(rounding)


@pytest.mark.parametrize("outliers", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("rows", [1, 40])
def test_accuracy(native: NativeBackend, rows: int, outliers: float) -> None:
    """With outliers, one input of each row is so many times larger than the others."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 576, generator=g)
    x[:, 5] *= max(1.0, outliers)
    mine, usual, rounding = errors(native, x.to(BF16), NF4Weight.quantize(torch.randn(1000, 576, generator=g)))
    assert mine <= 1.02 * usual
    if native.isa != "amx":
        assert mine <= 1.02 * rounding


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_largest_sums(native: NativeBackend, size: float) -> None:
    """All weights ±absmax, all inputs of one size: what a block's sum must hold at most."""
    sign = torch.randn(16, 128).sign()
    sign[0], sign[1] = 1, -1
    weight = NF4Weight.quantize(sign)
    x = torch.full((3, 128), size).to(BF16)
    x[1] *= torch.randn(128).sign()
    got = run(native.prepare([LinearPart(weight)], [0]), native, x, []).double()
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    torch.testing.assert_close(got, exact, rtol=1 / 128, atol=size / 64)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_row_that_is_not_finite_stays_so_and_alone(native: NativeBackend, bad: float) -> None:
    weight = NF4Weight.quantize(torch.randn(32, 128))
    linear = native.prepare([LinearPart(weight)], [0])
    x = torch.randn(5, 128).to(BF16)
    expected = run(linear, native, x, [])
    x[2, 70] = bad
    got = run(linear, native, x, [])
    assert not got[2].isfinite().any()
    assert torch.equal(got[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("shape", [(16, 64), (5, 128), (100, 576), (48, 4096)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("vectors", [False, True])
def test_unpacking_gives_the_weight_back(vectors: bool, double: bool, shape: tuple[int, int]) -> None:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(7)) + 0.1
    codes, state = bnb.quantize_4bit(values, blocksize=64, compress_statistics=double, quant_type="nf4")
    weight = NF4Weight.from_checkpoint(codes, state.as_dict(packed=True))
    again = PackedNF4.pack(weight, vectors=vectors).unpack()
    assert again.shape == weight.shape
    for name in ("codes", "absmax", "table", "nested_absmax", "nested_table", "offset"):
        before, after = getattr(weight, name), getattr(again, name)
        assert (before is None) is (after is None), name
        if before is not None:
            assert before.dtype == after.dtype, name
            assert torch.equal(before, after), name


def test_a_linear_gives_its_parts_back(native: NativeBackend) -> None:
    for depth in (128, 80):  # the native path and the other one
        parts = [LinearPart(NF4Weight.quantize(torch.randn(n, depth))) for n in (48, 5)]
        linear = native.prepare(parts, [0, 1])
        for i, part in enumerate(parts):
            assert torch.equal(linear.dequantize(i), part.weight.dequantize(torch.float32))


@pytest.mark.parametrize("vectors", [False, True])
def test_the_packed_weight_is_no_larger(vectors: bool) -> None:
    weight = NF4Weight.quantize(torch.randn(576, 1536))
    assert PackedNF4.pack(weight, vectors=vectors).nbytes * 8 / weight.numel < 4.13


def test_an_odd_depth_takes_the_other_path(native: NativeBackend) -> None:
    part = LinearPart(NF4Weight.quantize(torch.randn(32, 80)))
    linear = native.prepare([part], [0])
    assert not isinstance(linear, NativeLinear)
    x = torch.randn(3, 80).to(BF16)
    expected = REFERENCE.linear(x, [part], [])[0]
    torch.testing.assert_close(run(linear, native, x, []), expected, rtol=3e-2, atol=1e-1)


@pytest.mark.parametrize("shape", [(1000, 64), (49, 96), (16, 32)])
def test_dense(native: NativeBackend, shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape).to(BF16)
    linear = native.prepare_dense(weight, None)
    assert linear is not None
    x = torch.randn(19, shape[1]).to(BF16)
    torch.testing.assert_close(run(linear, native, x, []).float(), x.float() @ weight.float().T, rtol=2e-2, atol=5e-2)


def rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1).float()
    return (x.float() * cosines[:, None].float() + turned * sines[:, None].float()).to(BF16)


@pytest.mark.parametrize("seed", range(30))
def test_attention(native: NativeBackend, seed: int) -> None:
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)
    kv_heads, group, dim = choose.choice(
        [(1, 4, 16), (2, 3, 64), (3, 1, 32), (2, 20, 128), (3, 3, 64), (1, 8, 80), (1, 1, 64), (1, 4, 256), (1, 33, 16)]
    )
    block, blocks = choose.choice([(4, 120), (16, 40), (32, 20)])
    sinks = torch.randn(kv_heads * group, generator=g) if choose.random() < 0.3 else None
    shape = AttentionShape(dim**-0.5, choose.choice([None, 3, 20, 50]), choose.choice([None, 2.0]), sinks)
    lengths = [(choose.randint(0, 80), choose.choice([1, 1, 5, 40])) for _ in range(choose.randint(1, 4))]
    cache = LayerCache.allocate(blocks, block, kv_heads, dim, dim, BF16, torch.device("cpu"))
    cache.keys.normal_(generator=g)
    cache.values.normal_(generator=g)
    free = torch.randperm(blocks, generator=g).tolist()
    starts, contexts, slots, tables = [0], [], [], []
    for cached, new in lengths:
        table = [free.pop() for _ in range(-(-(cached + new) // block))]
        slots += [table[p // block] * block + p % block for p in range(cached, cached + new)]
        starts.append(starts[-1] + new)
        contexts.append(cached + new)
        tables.append(table)
    # What an earlier owner left in blocks must not matter, even if it was no number.
    cache.values[free] = float("nan")
    cache.keys[free] = float("nan")
    for table, context in zip(tables, contexts, strict=True):
        if context % block:
            cache.values[table[-1], :, context % block :] = float("nan")
            cache.keys[table[-1], :, context % block :] = float("nan")
    width = max(map(len, tables))
    batch = PagedBatch(
        torch.tensor(slots),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        torch.tensor([t + [-1] * (width - len(t)) for t in tables], dtype=torch.int32),
        tuple(starts),
        tuple(contexts),
    )
    q, k, v = (torch.randn(starts[-1], h, dim, generator=g).to(BF16) for h in (kv_heads * group, kv_heads, kv_heads))
    angles = torch.rand(starts[-1], dim // 2, generator=g).repeat(1, 2)
    cosines, sines = angles.cos().to(BF16), angles.sin().to(BF16)
    rotary = choose.random() < 0.5
    other = LayerCache(cache.keys.clone(), cache.values.clone())
    if rotary:
        expected = REFERENCE.attention(rotated(q, cosines, sines), rotated(k, cosines, sines), v, other, batch, shape)
        got = native.rotary_attention(q, k, v, cosines, sines, cache, batch, shape)
    else:
        expected = REFERENCE.attention(q, k, v, other, batch, shape)
        got = native.attention(q, k, v, cache, batch, shape)
    assert torch.equal(cache.keys.nan_to_num(7.0), other.keys.nan_to_num(7.0))
    assert torch.equal(cache.values.nan_to_num(7.0), other.values.nan_to_num(7.0))
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
    s = choose.randrange(len(lengths))
    row = starts[s + 1] - 1
    alone = PagedBatch(
        batch.slots[row : row + 1],
        torch.tensor([0, 1], dtype=torch.int32),
        batch.context_lens[s : s + 1],
        batch.block_tables[s : s + 1],
        (0, 1),
        (contexts[s],),
    )
    one = slice(row, row + 1)
    if rotary:
        again = native.rotary_attention(q[one], k[one], v[one], cosines[one], sines[one], cache, alone, shape)
    else:
        again = native.attention(q[one], k[one], v[one], cache, alone, shape)
    assert torch.equal(again[0], got[row]), "a row alone, decoded from the cache, differs from the same row in a chunk"


@pytest.mark.parametrize("rows", [1, 5])
def test_a_dimension_of_size_one_may_have_any_stride(native: NativeBackend, rows: int) -> None:
    """One key/value head, one row: torch calls such a tensor contiguous whatever that dimension's stride is."""
    g = torch.Generator().manual_seed(rows)
    dim, heads, block = 32, 3, 4

    def odd(t: torch.Tensor) -> torch.Tensor:
        """The same values; every dimension of size 1 steps over what the tensor does not have."""
        return t.as_strided(t.shape, [1000 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])

    q, k, v = (torch.randn(rows, h, dim, generator=g).to(BF16) for h in (heads, 1, 1))
    cosines, sines = (torch.randn(rows, dim, generator=g).to(BF16) for _ in range(2))
    batch = PagedBatch(
        torch.arange(rows),
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([rows], dtype=torch.int32),
        odd(torch.arange(2, dtype=torch.int32)[None]),
        (0, rows),
        (rows,),
    )
    shape = AttentionShape(dim**-0.5)
    caches = [LayerCache.allocate(2, block, 1, dim, dim, BF16, torch.device("cpu")) for _ in range(4)]
    expected = REFERENCE.attention(q, k, v, caches[0], batch, shape)
    got = native.attention(odd(q), odd(k), odd(v), caches[1], batch, shape)
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
    turned = native.rotary_attention(q, k, v, cosines, sines, caches[2], batch, shape)
    again = native.rotary_attention(odd(q), odd(k), odd(v), odd(cosines), odd(sines), caches[3], batch, shape)
    assert torch.equal(again, turned)
    x, weight = torch.randn(rows, dim, generator=g).to(BF16), torch.randn(dim, generator=g).to(BF16)
    for got, expected in zip(native.norm(odd(x), odd(x), weight, 1e-5), native.norm(x, x, weight, 1e-5), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(native.gate(odd(x)), native.gate(x))
    part = LinearPart(NF4Weight.quantize(torch.randn(16, 64, generator=g)))
    y = torch.randn(rows, 64, generator=g).to(BF16)
    linear = native.prepare([part], [0])
    assert torch.equal(run(linear, native, odd(y), []), run(linear, native, y, []))


def test_rows_of_a_wider_tensor_are_read_where_they_are(native: NativeBackend) -> None:
    """One head out of a fused q/k/v row: what norms are given then is a view with gaps between its rows."""
    wide, weight = torch.randn(5, 96).to(BF16), torch.randn(32).to(BF16)
    for gaps in (wide[:, 32:64], wide[:, 64:]):
        assert torch.equal(native.norm(gaps, None, weight, 1e-5)[1], native.norm(gaps.clone(), None, weight, 1e-5)[1])
        assert torch.equal(native.norm(gaps, gaps, weight, 1e-5)[1], native.norm(gaps + gaps, None, weight, 1e-5)[1])
        assert torch.equal(native.gate(gaps), native.gate(gaps.clone()))


@pytest.mark.parametrize("dim", [512, 520, 1100])
def test_the_widest_heads(native: NativeBackend, dim: int) -> None:
    """Up to 512 natively; beyond that on the torch path."""
    g = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(3, h, dim, generator=g).to(BF16) for h in (2, 1, 1))
    starts = torch.tensor([0, 3], dtype=torch.int32)
    batch = PagedBatch(torch.arange(3), starts, starts[1:], torch.tensor([[0]], dtype=torch.int32), (0, 3), (3,))
    caches = [LayerCache.allocate(1, 4, 1, dim, dim, BF16, torch.device("cpu")) for _ in range(2)]
    shape = AttentionShape(dim**-0.5)
    expected = REFERENCE.attention(q, k, v, caches[0], batch, shape)
    torch.testing.assert_close(native.attention(q, k, v, caches[1], batch, shape), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(("rows", "width"), [(1, 576), (16, 576), (300, 576), (7, 100)])
def test_norm_and_gate(native: NativeBackend, rows: int, width: int) -> None:
    x, residual, weight = (torch.randn(*s).to(BF16) for s in ((rows, width), (rows, width), (width,)))
    total, y = native.norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    f = total.float()
    expected = weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5)).to(BF16)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    same, again = native.norm(total, None, weight, 1e-5)
    assert same is total
    assert torch.equal(again, y)
    both = torch.randn(rows, 2 * width).to(BF16) * 4
    gated = torch.nn.functional.silu(both[:, :width]) * both[:, width:]
    torch.testing.assert_close(native.gate(both), gated, rtol=1e-2, atol=1e-2)

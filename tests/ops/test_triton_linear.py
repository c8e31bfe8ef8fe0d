"""The Triton kernels of linear operations against the reference, and the promise that company changes no bits.

On a CUDA device if there is one, else interpreted.
"""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.ops.triton_device import DEVICE, EXAMPLES, sum_all_rows_alike

pytest.importorskip("triton")

from loramux.ops.backend import LinearPart, SiteSegment
from loramux.ops.cuda import precompile
from loramux.ops.cuda import segments as segments_module
from loramux.ops.cuda.linear import Operation, TritonLinear, tiling
from loramux.ops.cuda.lookup import NF4_VALUES, lookup_assembly
from loramux.ops.cuda.precompile import Shapes
from loramux.ops.cuda.segments import TritonSegments, bind
from loramux.ops.cuda.tiles import TiledNF4
from loramux.ops.dense import DenseWeight
from loramux.ops.nf4 import NF4Weight
from loramux.ops.reference import ReferenceBackend
from loramux.ops.segment import AdapterWeights, LoraWeights, Segment
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

REFERENCE = ReferenceBackend()
BF16 = torch.bfloat16
RANKS = (1, 3, 8, 16, 24, 200)
TOLERANCE = {BF16: 2e-2, torch.float16: 4e-3}


def quantize(values: torch.Tensor, *, double: bool = True) -> NF4Weight:
    codes, state = bnb.quantize_4bit(values, blocksize=64, compress_statistics=double, quant_type="nf4")
    return NF4Weight.from_checkpoint(codes, state.as_dict(packed=True))


def flat(factors: list[LoraWeights | None], dtype: torch.dtype) -> AdapterWeights:
    """One buffer of the factors, each at a multiple of 64 bytes, NaN between them: nothing may be read there."""
    offsets = torch.full((len(factors), 4), -1, dtype=torch.int64)
    ranks = torch.zeros(len(factors), dtype=torch.int32)
    chunks = [torch.full((32,), torch.nan, dtype=dtype)]
    at = 32
    for site, lora in enumerate(factors):
        if lora is None:
            continue
        ranks[site] = lora.a.shape[0]
        for i, tensor in enumerate((lora.a, lora.b, lora.bias, lora.scale)):
            if tensor is not None:
                elements = tensor.flatten().view(dtype)
                offsets[site, i] = at
                chunks += [elements, torch.full((32 + -elements.numel() % 32,), torch.nan, dtype=dtype)]
                at += chunks[-2].numel() + chunks[-1].numel()
    views = {i: factor for i, factor in enumerate(factors) if factor is not None}
    return AdapterWeights(torch.cat(chunks).to(DEVICE), offsets, ranks, views)


class Case:
    """Random parts and segments, for the reference (on the CPU) and for the kernels."""

    def __init__(self, seed: int, rows: int, dtype: torch.dtype) -> None:
        self.choose = random.Random(seed)
        self.g = torch.Generator().manual_seed(seed)
        self.rows, self.dtype = rows, dtype
        self.k = self.choose.choice([64, 192, 1024])
        self.double = self.choose.random() < 0.7
        self.widths = [self.choose.choice([5, 48, 64, 100, 192]) for _ in range(self.choose.randint(1, 3))]
        self.parts = [self.part(n) for n in self.widths]
        self.plain: list[SiteSegment] = []
        self.segments: list[Segment] = []
        # Rows of segments with a scale are in no other; the rest may overlap.
        shared = self.choose.randint(0, rows)
        for _ in range(self.choose.randint(0, 4)):
            self.add_segment(0, shared, scaled=False)
        while shared < rows and self.choose.random() < 0.8:
            shared = self.add_segment(shared, rows, scaled=True)
        self.x = self.draw(rows, self.k).to(dtype)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.g)

    def part(self, n: int) -> LinearPart:
        bias = self.draw(n).to(self.dtype) if self.choose.random() < 0.5 else None
        return LinearPart(quantize(self.draw(n, self.k) / self.k**0.5, double=self.double), bias)

    def add_segment(self, first: int, last: int, *, scaled: bool) -> int:
        """A segment within these rows; returns where it ends."""
        start = self.choose.randint(first, last)
        stop = self.choose.randint(start, last)  # empty ones included
        weight, rank = self.choose.choice([1.0, -0.5, 0.25]), self.choose.choice(RANKS)
        factors: list[LoraWeights | None] = []
        for n in self.widths:
            a, b = (self.draw(rank, self.k) / self.k**0.5), (self.draw(n, rank) / rank**0.5)
            bias = self.draw(n).to(self.dtype) if self.choose.random() < 0.3 else None
            scale = self.draw(n) if scaled and self.choose.random() < 0.8 else None
            lora = LoraWeights(a.to(self.dtype), b.to(self.dtype), bias, scale)
            factors.append(lora if self.choose.random() < 0.7 else None)
        self.plain.append(SiteSegment(start, stop, weight, tuple(factors)))
        self.segments.append(Segment(start, stop, weight, flat(factors, self.dtype)))
        return stop

    def linear(self, *, invariant: bool = False) -> TritonLinear:
        parts = [
            LinearPart(part.weight.to(DEVICE), None if part.bias is None else part.bias.to(DEVICE))
            for part in self.parts
            if isinstance(part.weight, NF4Weight)
        ]
        assert TritonLinear.accepts(parts)
        return TritonLinear.pack(parts, range(len(parts)), invariant=invariant)

    def expected(self) -> torch.Tensor:
        return torch.cat(REFERENCE.linear(self.x.float(), self.parts, self.plain), dim=1)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated and not written holds NaN (or, as integers, nonsense)."""
    empty = torch.empty

    def nan(*args: object, **kwargs: object) -> torch.Tensor:
        made: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(torch.nan if made.dtype.is_floating_point else 0x5A)

    def new(self: torch.Tensor, *shape: int, **kwargs: object) -> torch.Tensor:
        return nan(*shape, **{"dtype": self.dtype, "device": self.device, **kwargs})

    monkeypatch.setattr(torch, "empty", nan)
    monkeypatch.setattr(torch.Tensor, "new_empty", new)


def run(linear: TritonLinear, x: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    return linear.run(x.to(DEVICE), bind(tuple(segments), DEVICE)).cpu()


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 70), dtype=st.sampled_from([BF16, torch.float16]))
@example(seed=3, rows=70, dtype=BF16)
@example(seed=5, rows=1, dtype=torch.float16)
def test_linear(seed: int, rows: int, dtype: torch.dtype) -> None:
    case = Case(seed, rows, dtype)
    linear = case.linear()
    x = case.x.clone()
    got = run(linear, case.x, case.segments)
    assert torch.equal(case.x, x)
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), case.expected(), rtol=tolerance, atol=tolerance)
    assert not linear._arrivals.any()
    assert torch.equal(run(linear, case.x, case.segments), got)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 70), dtype=st.sampled_from([BF16, torch.float16]))
def test_company_changes_no_bits(monkeypatch: pytest.MonkeyPatch, seed: int, rows: int, dtype: torch.dtype) -> None:
    sum_all_rows_alike(monkeypatch)
    case = Case(seed, rows, dtype)
    linear = case.linear(invariant=True)
    got = run(linear, case.x, case.segments)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), case.expected(), rtol=tolerance, atol=tolerance)
    for row in {0, rows - 1, case.choose.randrange(rows)}:
        own = [Segment(0, 1, s.weight, s.sites) for s in case.segments if s.start <= row < s.stop]
        assert torch.equal(run(linear, case.x[row : row + 1], own)[0], got[row]), f"row {row} alone differs"


def test_tiles_and_shares_do_not_change_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_all_rows_alike(monkeypatch)
    g = torch.Generator().manual_seed(0)
    linear = TritonLinear.pack(
        [LinearPart(quantize(torch.randn(64, 1024, generator=g) / 32).to(DEVICE))], [0], invariant=True
    )
    x = torch.randn(130, 1024, generator=g).to(BF16)
    got = run(linear, x, [])
    for row in (0, 64, 129):
        assert torch.equal(run(linear, x[row : row + 1], [])[0], got[row])
    assert {tiling(rows, invariant=True) for rows in (1, 8, 64, 500)} == {tiling(1, invariant=True)}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="launches are looked at in the interpreter's place")
@pytest.mark.parametrize("rows", [1, 64, 128, 200])
def test_nothing_is_launched_between_an_operations_two_kernels(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """The second may begin while the first runs, if it is the next; a fill of zeros once came between."""
    operation = Operation(4096, (512,))
    linear = precompile._linear(operation, Shapes((operation,), (), 64, 0, overlap=True))
    segments = TritonSegments.reserve(1, rows, 16, precompile.META, extras=False)
    launched: list[str] = []

    class Launched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "empty" not in str(func):
                launched.append(str(func))
            return func(*args, **(kwargs or {}))

    def run(kernel: Any, *args: Any, SPLITS: int, **kwargs: Any) -> None:
        assert SPLITS > 1
        launched.append(kernel.fn.__name__)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    x = torch.empty(rows, operation.inputs, dtype=torch.bfloat16, device=precompile.META)
    with Launched():
        linear.run(x, segments)
    assert launched[-2:] == ["lora_down", "nf4_linear"]


def test_shares_of_the_inputs_add_up() -> None:
    g = torch.Generator().manual_seed(1)
    weight = quantize(torch.randn(64, 4096, generator=g) / 64)
    linear = TritonLinear.pack([LinearPart(weight.to(DEVICE))], [0])
    assert linear._splits(1, 8) == 8
    x = torch.randn(3, 4096, generator=g).to(BF16)
    (expected,) = REFERENCE.linear(x.float(), [LinearPart(weight)], [])
    torch.testing.assert_close(run(linear, x, []).float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("double", [True, False])
def test_weights_come_back_to_the_bit(double: bool) -> None:
    g = torch.Generator().manual_seed(2)
    weights = [quantize(torch.randn(n, 192, generator=g), double=double).to(DEVICE) for n in (100, 64, 5)]
    linear = TritonLinear.pack([LinearPart(weight) for weight in weights], [0, 1, 2])
    tiled = TiledNF4.pack(weights)
    for part, weight in enumerate(weights):
        assert torch.equal(tiled.unpack(part).codes, weight.codes)
        assert torch.equal(linear.dequantize(part), weight.dequantize(torch.float32))
    assert linear.numel == 169 * 192


def test_a_strided_input_and_no_rows() -> None:
    case = Case(8, 6, BF16)
    linear = case.linear()
    wide = torch.cat([case.x, torch.full_like(case.x, torch.nan)], dim=1).to(DEVICE)
    bound = bind(tuple(case.segments), DEVICE)
    assert torch.equal(linear.run(wide[:, : case.k], bound).cpu(), run(linear, case.x, case.segments))
    assert linear.run(wide[:0, : case.k], bind((), DEVICE)).shape == (0, sum(case.widths))


def test_a_table_is_written_in_place() -> None:
    case = Case(21, 9, BF16)
    linear, x = case.linear(), case.x.to(DEVICE)
    reserved = TritonSegments.reserve(12, 100, 200, DEVICE, extras=True)
    base = linear.run(x, bind((), DEVICE, into=reserved))
    torch.testing.assert_close(base, linear.run(x, bind((), DEVICE)), rtol=2e-2, atol=2e-2)
    bound = bind(tuple(case.segments), DEVICE, into=reserved)
    assert bound.table.data_ptr() == reserved.table.data_ptr()
    got = linear.run(x, bound)
    torch.testing.assert_close(got.float().cpu(), case.expected(), rtol=2e-2, atol=2e-2)
    assert torch.equal(linear.run(x, bind((), DEVICE, into=reserved)), base)
    for small in (
        replace(reserved, max_rank=0),
        replace(reserved, rows=0),
        TritonSegments.reserve(0, 100, 200, DEVICE, extras=True),
    ):
        with pytest.raises(ValueError, match="do not fit a table"):
            bind((Segment(0, 1, 1.0, flat([lora()], BF16)),), DEVICE, into=small)
    with pytest.raises(TypeError, match="AdapterWeights"):
        bind((Segment(0, 1, 1.0, {}),), DEVICE)


def lora(rank: int = 4, n: int = 64, k: int = 64) -> LoraWeights:
    return LoraWeights(torch.ones(rank, k, dtype=BF16), torch.ones(n, rank, dtype=BF16))


def test_copies_on_the_device_go_with_their_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = flat([lora()], BF16)
    elsewhere = torch.device("meta") if DEVICE.type == "cpu" else DEVICE
    placed = segments_module._on_device(weights, elsewhere)
    assert placed[0].device.type == elsewhere.type
    assert segments_module._on_device(weights, elsewhere)[1] is placed[1]
    count = len(segments_module._placed)
    del weights
    gc.collect()
    assert len(segments_module._placed) == count - 1


def test_what_is_not_taken() -> None:
    g = torch.Generator().manual_seed(3)
    single, double = (quantize(torch.randn(8, 64, generator=g), double=double) for double in (False, True))
    ragged = quantize(torch.randn(8, 80, generator=g))
    other = replace(double, table=double.table.flip(0))
    for parts in ([DenseWeight(torch.zeros(8, 64))], [single, double], [ragged], [other]):
        assert not TritonLinear.accepts([LinearPart(weight) for weight in parts])
    assert TritonLinear.accepts([LinearPart(double), LinearPart(double)])


def execute(assembly: str, word: int) -> list[int]:
    """The few PTX instructions of the look-up, for one input word: its four output words."""
    registers: dict[str, int] = {"$4": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in assembly.splitlines()[2:-1]:
        name, _, rest = line.rstrip(";").partition(" ")
        target, *sources = rest.split(", ")
        operands = [value(source) for source in sources]
        if name == "prmt.b32":
            bytes_ = (operands[0] | operands[1] << 32).to_bytes(8, "little")
            nibbles = [operands[2] >> 4 * i & 15 for i in range(4)]
            assert max(nibbles) < 8, "bit 3 asks for the sign"
            registers[target] = int.from_bytes(bytes(bytes_[nibble] for nibble in nibbles), "little")
        else:
            first, second = operands
            registers[target] = {"and": first & second, "or": first | second, "shr": first >> second}[
                name[:-4].rstrip("_")
            ]
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_look_up_in_registers(dtype: torch.dtype) -> None:
    """The interpreter looks up in memory, so the assembly is executed here, by hand."""
    assembly, choose = lookup_assembly(dtype), random.Random(0)
    assert dtype == BF16 or lookup_assembly(BF16) != assembly
    values = torch.tensor(NF4_VALUES).to(dtype)
    assert torch.equal(torch.tensor(NF4_VALUES), quantize(torch.ones(1, 64)).table)
    for word in [int(f"{i:x}" * 8, 16) for i in range(16)] + [choose.getrandbits(32) for _ in range(200)]:
        out = torch.tensor([w - (w >> 31 << 32) for w in execute(assembly, word)], dtype=torch.int32).view(dtype)
        codes = torch.tensor(list(word.to_bytes(4, "little")))
        assert torch.equal(out, torch.cat((values[codes >> 4], values[codes & 15])))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(4))
def test_many_rows_are_multiplied_densely(seed: int, dtype: torch.dtype) -> None:
    case = Case(seed, 520, dtype)
    linear = case.linear()
    y = linear.run(case.x.to(DEVICE), bind(tuple(case.segments), DEVICE))
    expected = case.expected()
    error = (y.cpu().float() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]
    assert [tuple(part.shape) for part in linear(case.x.to(DEVICE), bind((), DEVICE))] == [
        (520, n) for n in case.widths
    ]

"""The linear kernels at the shapes of Llama-3-8B, in every kind of company; interpreted, at small shapes of the same
kinds, where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.ops.test_triton_linear import flat
from tests.ops.triton_device import DEVICE, LARGE

pytest.importorskip("triton")

from loramux.ops.backend import LinearPart, SiteSegment
from loramux.ops.cuda.linear import TritonLinear
from loramux.ops.cuda.segments import bind
from loramux.ops.dense import DenseWeight
from loramux.ops.nf4 import NF4Weight
from loramux.ops.reference import ReferenceBackend
from loramux.ops.segment import AdapterWeights, LoraWeights, Segment

REFERENCE = ReferenceBackend()
OPERATIONS: dict[str, tuple[int, tuple[int, ...]]] = {
    "q/k/v": (4096, (4096, 1024, 1024)) if LARGE else (128, (128, 64, 64)),
    "o": (4096, (4096,)) if LARGE else (128, (128,)),
    "gate/up": (4096, (14336, 14336)) if LARGE else (128, (192, 192)),
    "down": (14336, (4096,)) if LARGE else (1088, (64,)),
}
SHAPES = OPERATIONS | {"129 blocks": (129 * 64, (128 if LARGE else 5,))}
ROWS = (1, 8, 16, 32, 64, 128, 300) if LARGE else (1, 33)
# Relative to the norm of the right answer: what rounding weights and sums to bfloat16 costs, and float16.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}


@cache
def operation(name: str) -> tuple[list[LinearPart], list[LinearPart]]:
    """The parts of an operation for the kernels, and the same weights in float32."""
    k, widths = SHAPES[name]
    g = torch.Generator(DEVICE).manual_seed(k)
    quantized = [NF4Weight.quantize(torch.randn(n, k, generator=g, device=DEVICE) / k**0.5) for n in widths]
    plain = [DenseWeight(weight.dequantize(torch.float32)) for weight in quantized]
    return [LinearPart(weight) for weight in quantized], [LinearPart(weight) for weight in plain]


@cache
def adapter(name: str, rank: int, dtype: torch.dtype, *, dora: bool) -> tuple[AdapterWeights, list[LoraWeights]]:
    """Of an operation's parts: as the kernels read it, and as the reference does. With a scale and a bias if `dora`."""
    k, widths = SHAPES[name]
    g = torch.Generator().manual_seed(rank)

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    def there(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(DEVICE)

    factors: list[LoraWeights | None] = []
    plain = []
    for n in widths:
        a, b = draw(rank, k, scale=k**-0.5).to(dtype), draw(n, rank, scale=rank**-0.5).to(dtype)
        bias = draw(n, scale=0.5).to(dtype) if dora else None
        scale = 1 + draw(n, scale=0.2) if dora else None
        factors.append(LoraWeights(a, b, bias, scale))
        plain.append(LoraWeights(a.to(DEVICE), b.to(DEVICE), there(bias), there(scale)))
    return flat(factors, dtype), plain


class Company:
    """Segments over some rows, as the kernels read them and as the reference does."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self._name, self._dtype = name, dtype
        self.segments: list[Segment] = []
        self.plain: list[SiteSegment] = []

    def add(self, start: int, stop: int, rank: int, weight: float = 1.0, *, dora: bool = False) -> None:
        """An adapter of that rank on these rows."""
        weights, plain = adapter(self._name, rank, self._dtype, dora=dora)
        self.segments.append(Segment(start, stop, weight, weights))
        self.plain.append(SiteSegment(start, stop, weight, tuple(plain)))


def base(company: Company, rows: int) -> None:
    """No adapter."""


def rank_16(company: Company, rows: int) -> None:
    company.add(0, rows, 16)


def rank_64(company: Company, rows: int) -> None:
    company.add(0, rows, 64)


def sixteen(company: Company, rows: int) -> None:
    """Adapters of many ranks, each for a share of the rows; some rows have none."""
    count = min(rows, 16 if LARGE else 4)
    for i in range(count):
        company.add(i * rows // count, (i + 1) * rows // count - (i == 3), (8, 16, 32, 64, 4, 200)[i % 6])


def dora(company: Company, rows: int) -> None:
    company.add(0, (rows + 1) // 2, 16, 2.0, dora=True)
    company.add((rows + 1) // 2, rows, 32, 0.5, dora=True)


def mix(company: Company, rows: int) -> None:
    """Two adapters on the same rows."""
    company.add(0, rows, 16, 0.75)
    company.add(0, rows, 64, -0.5)


COMPANIES: tuple[Callable[[Company, int], None], ...] = (base, rank_16, rank_64, sixteen, dora, mix)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_linear_at_real_shapes(name: str, rows: int) -> None:
    check(name, rows, torch.bfloat16)


def test_a_last_share_without_blocks() -> None:
    """Shares of K are rounded up: of 129 blocks in sixteen shares the last has none."""
    check("129 blocks", 1, torch.bfloat16, COMPANIES if LARGE else (base, rank_16))


@pytest.mark.parametrize("name", ["q/k/v", "down"])
def test_linear_in_float16(name: str) -> None:
    check(name, 32 if LARGE else 5, torch.float16)


@pytest.mark.parametrize("name", ["q/k/v", "down"])
def test_company_changes_no_bits(name: str) -> None:
    """Ranks of 8 and 64 among them: another tile of ranks would be multiplied by another instruction."""
    if not LARGE:
        pytest.skip("the interpreter's own sums differ by shape; tests/ops has this with one order")
    quantized, _ = operation(name)
    linear = TritonLinear.pack(quantized, range(len(quantized)), invariant=True)
    company = Company(name, torch.bfloat16)
    for start, rank in enumerate((8, 64, 16, 200, 8)):
        company.add(3 * start, 3 * start + 3, rank)
    x = torch.randn(40, SHAPES[name][0], device=DEVICE).to(torch.bfloat16)
    together = linear.run(x, bind(tuple(company.segments), DEVICE))
    for row in (*range(15), 20, 39):
        own = tuple(Segment(0, 1, 1.0, s.sites) for s in company.segments if s.start <= row < s.stop)
        assert torch.equal(linear.run(x[row : row + 1], bind(own, DEVICE))[0], together[row]), f"row {row}"


def check(
    name: str, rows: int, dtype: torch.dtype, companies: Sequence[Callable[[Company, int], None]] = COMPANIES
) -> None:
    quantized, reference = operation(name)
    linear = TritonLinear.pack(quantized, range(len(quantized)))
    k, widths = SHAPES[name]
    wrong = []
    for arrange in companies:
        company = Company(name, dtype)
        arrange(company, rows)
        # Other inputs each time, and memory that was NaN before: what is not written shows.
        x = torch.randn(rows, k, device=DEVICE).to(dtype)
        torch.full((rows, sum(widths)), torch.nan, dtype=dtype, device=DEVICE)
        got = linear.run(x, bind(tuple(company.segments), DEVICE)).float()
        expected = torch.cat(REFERENCE.linear(x.float(), reference, company.plain), dim=1)
        error = float((got - expected).norm() / expected.norm())
        worst = float((got - expected).abs().max() / expected.abs().max())
        if not (error < TOLERANCE[dtype] and worst < 5 * TOLERANCE[dtype]):
            wrong.append(f"{arrange.__name__}: relative error {error:.2e}, the worst {worst:.2e} of the largest")
    assert not wrong, f"{name}, {rows} rows: {'; '.join(wrong)}"

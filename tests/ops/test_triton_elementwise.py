"""The small Triton kernels against torch: rounded where transformers' modules round, and a row alone is the same row.

On a CUDA device if there is one, else interpreted; and compiled for GPUs that need not be there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.triton_device import DEVICE

pytest.importorskip("triton")

from loramux.ops.cuda.elementwise import gate, norm, rotate_and_store
from loramux.ops.cuda.sampling import CHUNK, greedy
from loramux.ops.paged import LayerCache

BF16 = torch.bfloat16
HALVES = [BF16, torch.float16]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_off_by_one_rounding_at_most(got: torch.Tensor, expected: torch.Tensor, share: float = 0.01) -> None:
    """Another order of summation, or another exponential, may tip a number over to its neighbour: few of them."""
    assert got.dtype == expected.dtype
    distance = (got.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert int(distance.max()) <= 1
    assert float((distance > 0).float().mean()) <= share


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (5, 576), (3, 100), (2, 4096), (1, 1), (0, 64)])
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (draw(i, *s, dtype=dtype) for i, s in enumerate([(rows, width), (rows, width), (width,)]))
    total, y = norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    f = total.float()
    expected = weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    if rows:
        assert_off_by_one_rounding_at_most(y, expected)
    same, again = norm(total, None, weight, 1e-5)
    assert same is total
    assert torch.equal(again, y)
    for i in range(rows):
        assert torch.equal(norm(x[i : i + 1], residual[i : i + 1], weight, 1e-5)[1][0], y[i])


def test_norm_of_rows_that_are_not_next_to_each_other() -> None:
    wide, weight = draw(0, 6, 300, dtype=BF16), draw(1, 200, dtype=BF16)
    x, residual = wide[::2, :200], wide[1::2, 100:]
    total, y = norm(x, residual, weight, 1e-6)
    expected = norm(x.contiguous(), residual.contiguous(), weight, 1e-6)
    assert torch.equal(total, expected[0])
    assert torch.equal(y, expected[1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (5, 100), (2, 1025), (0, 8)])
def test_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    both = draw(0, rows, 2 * width, dtype=dtype) * 8
    expected = torch.nn.functional.silu(both[:, :width]) * both[:, width:]
    got = gate(both)
    assert got.shape == expected.shape
    if rows:
        assert_off_by_one_rounding_at_most(got, expected)
        assert torch.equal(gate(both[-1:])[0], got[-1])


def test_gate_far_from_zero() -> None:
    """Where e^-x would overflow, and where nothing is left of it."""
    both = torch.tensor([[-300.0, -90.0, -20.0, 0.0, 90.0, 300.0] + 6 * [2.0]], device=DEVICE, dtype=BF16)
    expected = torch.nn.functional.silu(both[:, :6]) * both[:, 6:]
    torch.testing.assert_close(gate(both), expected, rtol=1e-2, atol=1e-30)


def turned(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    other = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x.float() * cosines[:, None].float() + other.float() * sines[:, None].float()).to(x.dtype)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"),
    [(4, 2, 16, 16), (9, 3, 64, 64), (20, 10, 80, 80), (3, 1, 96, 64), (2, 2, 6, 5), (1, 1, 2, 1)],
)
def test_rotate_and_store(
    heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype, rotary: bool
) -> None:
    """Views of a fused row; slots in any order, in the last block too; padding leaves no trace."""
    rows, block, blocks = 5, 4, 6
    widths = [heads * dim, kv_heads * dim, kv_heads * value_dim]
    fused = draw(0, rows, sum(widths) + 3, dtype=dtype)[:, : sum(widths)]
    q, k, v = fused.split(widths, dim=1)
    q, k, v = q.unflatten(1, (heads, dim)), k.unflatten(1, (kv_heads, dim)), v.unflatten(1, (kv_heads, value_dim))
    angles = draw(1, rows, dim)
    cosines, sines = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotary else (None, None)
    slots = torch.tensor([blocks * block - 1, 0, -1, 7, -1], device=DEVICE)
    cache = LayerCache.allocate(blocks, block, kv_heads, dim, value_dim, dtype, DEVICE)
    cache.keys.copy_(draw(2, *cache.keys.shape))
    cache.values.copy_(draw(3, *cache.values.shape))
    expected = LayerCache(cache.keys.clone(), cache.values.clone())
    before = fused.clone()

    got = rotate_and_store(q, k, v, cosines, sines, cache, slots)

    real = slots >= 0
    if cosines is not None and sines is not None:
        assert torch.equal(got, turned(q, cosines, sines))
        k = turned(k, cosines, sines)
    else:
        assert got is q
    expected.write(slots[real], k[real], v[real])
    assert torch.equal(cache.keys, expected.keys)
    assert torch.equal(cache.values, expected.values)
    assert torch.equal(fused, before)


def test_a_dimension_of_size_one_may_have_any_stride() -> None:
    """Torch calls such a tensor contiguous all the same; one head of one dimension is the extreme."""

    def odd(t: torch.Tensor) -> torch.Tensor:
        return t.as_strided(t.shape, [1000 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])

    q, k, v = (draw(i, 1, 1, 1, dtype=BF16) for i in range(3))
    cache = LayerCache.allocate(1, 1, 1, 1, 1, BF16, DEVICE)
    rotate_and_store(odd(q), odd(k), odd(v), None, None, cache, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    assert torch.equal(cache.keys.flatten(), k.flatten())
    assert torch.equal(cache.values.flatten(), v.flatten())
    x, weight = draw(3, 1, 1, dtype=BF16), draw(4, 1, dtype=BF16)
    assert torch.equal(norm(odd(x), odd(x), weight, 1e-5)[1], norm(x, x, weight, 1e-5)[1])
    assert greedy(odd(x))[0].tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 300), (2, CHUNK), (2, CHUNK + 1), (3, 3 * CHUNK - 7)])
def test_greedy(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = draw(rows, rows, vocabulary, dtype=dtype)
    ids, finite, logprob = greedy(logits)
    assert ids.tolist() == logits.float().cpu().numpy().argmax(axis=1).tolist()
    assert finite.tolist() == [True] * rows
    torch.testing.assert_close(logprob, logits.float().log_softmax(dim=1).amax(dim=1), rtol=1e-5, atol=1e-6)
    assert [t.dtype for t in (ids, finite, logprob)] == [torch.int64, torch.bool, torch.float32]
    for i in range(rows):
        assert all(
            torch.equal(a[0], b[i]) for a, b in zip(greedy(logits[i : i + 1]), (ids, finite, logprob), strict=True)
        )


@pytest.mark.parametrize("places", [(5, 9), (0, 2 * CHUNK), (CHUNK - 1, CHUNK), (CHUNK + 3, 2 * CHUNK + 4)])
def test_the_lowest_of_equal_logits_is_chosen(places: tuple[int, int]) -> None:
    logits = -draw(0, 2, 2 * CHUNK + 5).abs()
    logits[:, places] = 2.5
    assert greedy(logits)[0].tolist() == [min(places)] * 2
    assert greedy(torch.full_like(logits, -7.0))[0].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("place", [0, CHUNK, 2 * CHUNK + 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_logit_that_is_not_finite_is_found(bad: float, place: int, dtype: torch.dtype) -> None:
    logits = draw(0, 3, 2 * CHUNK + 5, dtype=dtype)
    logits[1, place] = bad
    ids, finite, _ = greedy(logits)
    assert finite.tolist() == [True, False, True]
    assert 0 <= int(ids[1]) < logits.shape[1]
    assert not greedy(torch.full((1, 9), bad, device=DEVICE, dtype=dtype))[1]


def test_the_lowest_finite_numbers_are_numbers() -> None:
    lowest = torch.full((1, CHUNK + 9), torch.finfo(torch.float32).min, device=DEVICE)
    assert [t.item() for t in greedy(lowest)[:2]] == [0, True]


def test_rows_need_not_be_next_to_each_other() -> None:
    logits = draw(0, 6, 500)
    assert greedy(logits[::2, 10:400])[0].tolist() == logits[::2, 10:400].argmax(dim=1).tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="the wheel brings ptxas for Linux")
def test_every_kernel_compiles_for_sm_80_and_sm_90_without_spilling() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.compile_small_kernels", "80", "90"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 16
    for kernel in compiled:
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] <= 128, kernel

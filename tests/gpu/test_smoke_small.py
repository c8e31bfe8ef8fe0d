"""Attention, the row-wise kernels and the sampler at the shapes of Llama-3; interpreted at small ones without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.triton_device import DEVICE, LARGE

pytest.importorskip("triton")

from loramux.ops.cuda import elementwise
from loramux.ops.cuda.attention import attention
from loramux.ops.cuda.sampling import greedy
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.reference import ReferenceBackend

BF16 = torch.bfloat16
BLOCK = 16
# Query heads, key-value heads, their dimension.
HEADS = {"Llama-3-8B": (32, 8, 128), "Llama-3.2-1B": (32, 8, 64)} if LARGE else {"small": (4, 2, 32)}
LONG = 1024 if LARGE else 70


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(BF16)


# Of each sequence: rows of this step, and tokens with them.
STEPS: dict[str, list[tuple[int, int]]] = {
    "one row": [(1, LONG)],
    "32 rows": [(1, LONG - 7 * i) for i in range(32 if LARGE else 3)],
    "a prompt": [(LONG // 2, LONG // 2)],
    "a chunk beside decoding": [(1, LONG), (LONG // 4, LONG), (1, 3)],
}


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", HEADS)
def test_attention_at_real_shapes(shape: str, step: str, invariant: bool) -> None:
    heads, kv_heads, dim = HEADS[shape]
    sequences = STEPS[step]
    blocks = [-(-context // BLOCK) for _, context in sequences]
    cache = LayerCache.allocate(sum(blocks) + 1, BLOCK, kv_heads, dim, dim, BF16, DEVICE)
    cache.keys.normal_()
    cache.values.normal_()
    order = iter((torch.randperm(sum(blocks)) + 1).tolist())
    tables = torch.zeros(len(sequences), max(blocks), dtype=torch.int32)
    starts, slots = [0], []
    for s, (rows, context) in enumerate(sequences):
        tables[s, : blocks[s]] = torch.tensor([next(order) for _ in range(blocks[s])])
        slots += [int(tables[s, p // BLOCK]) * BLOCK + p % BLOCK for p in range(context - rows, context)]
        starts.append(starts[-1] + rows)
    contexts = [context for _, context in sequences]
    batch = PagedBatch(
        torch.tensor(slots, device=DEVICE),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        tables.to(DEVICE),
        tuple(starts),
        tuple(contexts),
    )
    widths = heads * dim, kv_heads * dim, kv_heads * dim
    q, k, v = (part.unflatten(1, (-1, dim)) for part in draw(starts[-1], sum(widths)).split(widths, dim=1))
    angles = torch.rand(starts[-1], dim // 2, device=DEVICE) * 6
    cosines, sines = (torch.cat((t, t), dim=1).to(BF16) for t in (angles.cos(), angles.sin()))
    other = LayerCache(cache.keys.clone(), cache.values.clone())
    rotated = elementwise.rotate_and_store(q, k, v, cosines, sines, cache, batch.slots)
    got = attention(rotated, k, v, cache, batch, AttentionShape(dim**-0.5), invariant=invariant)

    turned, turned_k = (_rotate(t, cosines, sines) for t in (q, k))
    torch.testing.assert_close(rotated, turned, rtol=0, atol=0)
    expected = ReferenceBackend().attention(turned, turned_k, v, other, batch, AttentionShape(dim**-0.5))
    assert torch.equal(cache.keys, other.keys)
    assert torch.equal(cache.values, other.values)
    torch.testing.assert_close(got.float(), expected.float(), rtol=3e-2, atol=2e-2)


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """As transformers rotates halves, each product exact and the sum rounded once."""
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * cosines.float()[:, None] + torch.cat((-b, a), dim=-1) * sines.float()[:, None]).to(BF16)


@pytest.mark.parametrize("rows", [1, 33])
def test_norm_and_gate_at_real_widths(rows: int) -> None:
    width, inner = (4096, 14336) if LARGE else (96, 192)
    x, residual, weight = draw(rows, width), draw(rows, width), draw(width)
    total, y = elementwise.norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    wide = (x + residual).float()
    normal = (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-5)).to(BF16)
    torch.testing.assert_close(y.float(), (weight * normal).float(), rtol=1e-2, atol=1e-2)
    both = draw(rows, 2 * inner)
    expected = F.silu(both[:, :inner]) * both[:, inner:]
    torch.testing.assert_close(elementwise.gate(both).float(), expected.float(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 33])
def test_the_likeliest_token_of_a_real_vocabulary(rows: int) -> None:
    logits = draw(rows, 128_256 if LARGE else 5000)
    logits[-1, 7] = torch.nan
    ids, finite, logprob = greedy(logits)
    assert finite.tolist() == [True] * (rows - 1) + [False]
    assert ids[:-1].tolist() == logits[:-1].float().argmax(1).tolist()
    expected = logits[:-1].float().log_softmax(1).amax(1)
    torch.testing.assert_close(logprob[:-1], expected, rtol=1e-4, atol=1e-4)

"""Row-wise operations in Triton: RMSNorm, SiLU·mul, and the way of queries, keys and values into the cache.

Computed in float32 and rounded where transformers' modules round, like ops/cpu/elementwise.cpp and attention.cpp. A
row's result depends on the row and its width alone: how a width is cut up never follows from the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux.ops.layout import strided
from loramux.ops.paged import LayerCache

_GATE_COLUMNS = 1024
_HEADS = 8  # of a program: 32 heads of 128 take four, so that a few rows still fill the device


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(s, rms_norm(s)·weight) with s = x + residual; all [T, F] of one dtype, rows contiguous, weight [F].

    s is rounded before it is squared, and s / rms before it meets the weight, as LlamaRMSNorm does. Without residual,
    s is x itself.
    """
    assert strided(x, 1, 1)
    rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x
    if residual is not None:
        assert strided(residual, 1, 1)
        total = torch.empty_like(y)
    block = triton.next_power_of_2(width)
    if rows:
        _norm[(rows,)](
            x,
            x.stride(0),
            residual,
            0 if residual is None else residual.stride(0),
            weight,
            total,
            y,
            width,
            epsilon,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=norm_warps(block),
        )
    return total, y


def norm_warps(block: int) -> int:
    """How many warps share a row of `block` elements: 8 to 16 elements a thread, up to what a block of threads has."""
    return min(16, max(1, block // 512))


def gate(both: Tensor) -> Tensor:
    """silu(both[:, :N])·both[:, N:] → [T, N] for both [T, 2N], rows contiguous; silu is rounded before the product."""
    assert strided(both, 1, 1)
    rows, width = both.shape[0], both.shape[1] // 2
    y = both.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, _GATE_COLUMNS))
        _gate[grid](both, both.stride(0), y, width, BLOCK=_GATE_COLUMNS)
    return y


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    cache: LayerCache,
    slots: Tensor,
) -> Tensor:
    """Write rotated k and v into `cache` at `slots`; returns rotated q.

    q [T, H, D], k [T, H_kv, D] and v [T, H_kv, D_v] may be views of one fused row: only the last dimension has to be
    contiguous. cosines and sines [T, D] (halves, as transformers rotates) or both None: nothing is rotated, and q
    comes back as it is. slots int64 [T]; a row whose slot is negative is padding, of which nothing is written.
    """
    assert all(strided(t, t.dim() - 1, 1) for t in (q, k, v, cache.keys, cache.values))
    (rows, heads, dim), kv_heads, value_dim = q.shape, k.shape[1], v.shape[2]
    turns = cosines is not None and sines is not None
    rotated = q.new_empty(q.shape) if turns else q
    if not rows:
        return rotated
    if cosines is not None and sines is not None:
        assert dim % 2 == 0
        cosines, sines = cosines.contiguous(), sines.contiguous()
    tiles = triton.cdiv(kv_heads, _HEADS) * 2 + (triton.cdiv(heads, _HEADS) if turns else 0)
    _rotate_and_store[(rows, tiles)](
        q,
        q.stride(0),
        q.stride(1),
        k,
        k.stride(0),
        k.stride(1),
        v,
        v.stride(0),
        v.stride(1),
        cosines,
        sines,
        rotated,
        cache.keys,
        *cache.keys.stride()[:3],
        cache.values,
        *cache.values.stride()[:3],
        slots,
        heads,
        kv_heads,
        dim,
        value_dim,
        cache.block_size,
        ROTARY=turns,
        HEADS=_HEADS,
        HALF=triton.next_power_of_2(max(1, dim // 2)),
        DIM=triton.next_power_of_2(dim),
        VALUE_DIM=triton.next_power_of_2(value_dim),
    )
    return rotated


@triton.jit
def _norm(
    x,
    x_row,
    residual,
    residual_row,
    weight,
    total,
    y,
    width,
    epsilon,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_row + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(y.dtype.element_ty)
        tl.store(total + row * width + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / width + epsilon)
    normal = (value * scale).to(y.dtype.element_ty).to(tl.float32)
    scaled = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * normal
    tl.store(y + row * width + at, scaled.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate(both, both_row, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    a = tl.load(both + row * both_row + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(both + row * both_row + width + at, mask=inside, other=0.0).to(tl.float32)
    # e^-|a| cannot overflow; both signs of the sigmoid follow from it.
    e = tl.exp(-tl.abs(a))
    silu = (a * (tl.where(a < 0, e, 1.0) / (1.0 + e))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + at, (silu * b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_store(
    q,
    q_row,
    q_head,
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    cosines,
    sines,
    rotated,
    keys,
    key_block,
    key_head,
    key_at,
    values,
    value_block,
    value_head,
    value_at,
    slots,
    heads,
    kv_heads,
    dim,
    value_dim,
    block_size,
    ROTARY: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """Programs of a row: one for each HEADS heads of q (if it turns), then of k, then of v."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    kv_tiles = tl.cdiv(kv_heads, HEADS)
    if ROTARY:
        if tile < tl.cdiv(heads, HEADS):
            _turn(
                q + row * q_row,
                q_head,
                rotated + row * heads * dim,
                dim,
                cosines + row * dim,
                sines + row * dim,
                tile * HEADS,
                heads,
                dim // 2,
                HEADS,
                HALF,
            )
        tile -= tl.cdiv(heads, HEADS)
    slot = tl.load(slots + row)
    if (tile >= 0) & (slot >= 0):
        block, place = slot // block_size, slot % block_size
        if tile < kv_tiles:
            target = keys + block * key_block + place * key_at
            first = tile * HEADS
            if ROTARY:
                _turn(
                    k + row * k_row,
                    k_head,
                    target,
                    key_head,
                    cosines + row * dim,
                    sines + row * dim,
                    first,
                    kv_heads,
                    dim // 2,
                    HEADS,
                    HALF,
                )
            else:
                _copy(k + row * k_row, k_head, target, key_head, first, kv_heads, dim, HEADS, DIM)
        else:
            target = values + block * value_block + place * value_at
            _copy(
                v + row * v_row,
                v_head,
                target,
                value_head,
                (tile - kv_tiles) * HEADS,
                kv_heads,
                value_dim,
                HEADS,
                VALUE_DIM,
            )


@triton.jit
def _turn(
    source,
    source_head,
    target,
    target_head,
    cosines,
    sines,
    first,
    heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate HEADS heads of one row. A product of two numbers of 16 bits is exact in float32, so that the sum is
    rounded in the same way whether or not the compiler fuses it with a product."""
    h = first + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)
    inside = (h < heads) & (i < half)[None, :]
    a = tl.load(source + h * source_head + i[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + h * source_head + half + i[None, :], mask=inside, other=0.0).to(tl.float32)
    cosine_a = tl.load(cosines + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    cosine_b = tl.load(cosines + half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sine_a = tl.load(sines + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sine_b = tl.load(sines + half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    place = target + h * target_head + i[None, :]
    tl.store(place, (a * cosine_a - b * sine_a).to(target.dtype.element_ty), mask=inside)
    tl.store(place + half, (b * cosine_b + a * sine_b).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _copy(
    source,
    source_head,
    target,
    target_head,
    first,
    heads,
    dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    h = first + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, DIM)[None, :]
    inside = (h < heads) & (i < dim)
    tl.store(target + h * target_head + i, tl.load(source + h * source_head + i, mask=inside), mask=inside)

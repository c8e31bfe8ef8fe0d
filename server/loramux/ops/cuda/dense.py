"""A dense layer that no adapter changes: the lm_head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from loramux.ops.backend import BoundSegments
from loramux.ops.fused import FusedLinear

_OUTPUTS, _ROWS, _INPUTS = 64, 16, 64


class DenseLinear(FusedLinear):
    """x·Wᵀ + bias by cuBLAS, which chooses its order of summation by the number of rows; with `invariant` by a kernel
    that has one tile shape."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, invariant: bool) -> None:
        """weight [N, K] contiguous, bfloat16 or float16; bias [N] or None."""
        self._weight, self._bias, self._invariant = weight, bias, invariant
        self.parts, self.width = 1, weight.shape[0]
        self.nbytes = self.numel = 0
        self.dense_nbytes, self.dense_numel = weight.numel() * weight.element_size(), weight.numel()

    def dequantize(self, part: int) -> Tensor:
        return self._weight.to(torch.float32, copy=True)

    def __call__(self, x: Tensor, segments: BoundSegments) -> tuple[Tensor, ...]:
        return (self.run(x, segments),)

    def run(self, x: Tensor, segments: BoundSegments) -> Tensor:
        if not self._invariant:
            return F.linear(x, self._weight, self._bias)
        rows, width = x.shape[0], self.width
        y = x.new_empty(rows, width)
        if rows:
            # Programs of the same outputs are neighbours: they find the weight in the cache.
            row_tiles = triton.cdiv(rows, _ROWS)
            _dense[(row_tiles * triton.cdiv(width, _OUTPUTS),)](
                x.contiguous(),
                self._weight,
                self._bias,
                y,
                rows,
                width,
                row_tiles,
                K=x.shape[1],
                BIAS=self._bias is not None,
                BLOCK_T=_ROWS,
                BLOCK_N=_OUTPUTS,
                BLOCK_K=_INPUTS,
                WIDE=_interpreted,
                num_warps=4,
                num_stages=4,
            )
        return y


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def _dense(
    x,
    weight,
    bias,
    y,
    rows,
    width,
    row_tiles,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of y [rows, width] = x [rows, K]·weight [width, K]ᵀ + bias, in float32, rounded once.

    WIDE: the interpreter's dot is wrong for bfloat16 operands, so it gets float32.
    """
    row = (tl.program_id(0) % row_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + inner < K
        a = tl.load(
            x + row[:, None].to(tl.int64) * K + k + inner[None, :],
            mask=(row < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + column[None, :] * K + k + inner[:, None],
            mask=(column < width)[None, :] & inside[:, None],
            other=0.0,
        )
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total)
    if BIAS:
        total += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + row[:, None].to(tl.int64) * width + column[None, :],
        total.to(y.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < width)[None, :],
    )


_interpreted = not isinstance(_dense, triton.JITFunction)

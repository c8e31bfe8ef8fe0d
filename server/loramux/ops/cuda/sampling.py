"""The likeliest token of each row in Triton, so that a greedy step moves a few numbers and no logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux.ops.layout import strided

CHUNK = 4096  # columns of a program: a vocabulary of 128k has 32, so that one row alone is read by many
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int64 [R], finite bool [R], logprob float32 [R]) of logits [R, V], any float dtype, rows contiguous.

    ids: the place of the largest logit, of equal ones the lowest; finite: whether all of the row's logits are (where
    not, the other two mean nothing); logprob: of ids, by the softmax of the row in float32. One pass over the logits.
    """
    assert strided(logits, 1, 1)
    rows, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        floats = torch.empty(2, rows, chunks, dtype=torch.float32, device=logits.device)
        integers = torch.empty(2, rows, chunks, dtype=torch.int32, device=logits.device)
        parts = floats[0], floats[1], integers[0], integers[1]
        _look[(rows, chunks)](logits, logits.stride(0), vocabulary, *parts, chunks, CHUNK=CHUNK, num_warps=8)
        _conclude[(rows,)](*parts, chunks, ids, finite, logprob, CHUNKS=triton.next_power_of_2(chunks), num_warps=1)
    return ids, finite, logprob


@triton.jit
def _look(
    logits,
    logits_row,
    vocabulary,
    highest,
    mass,
    place,
    broken,
    chunks,
    CHUNK: tl.constexpr,
):
    """Of one chunk of one row: its largest logit, Σ e^(logit - largest), where that is, and whether one is broken."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocabulary
    x = tl.load(logits + row * logits_row + at, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")  # not so for NaN
    # Of equal ones the first is taken, so that what is beyond the row never is.
    x = tl.where(inside & finite, x, _LOWEST)
    most, where = tl.max(x, axis=0, return_indices=True)
    out = row * chunks + chunk
    tl.store(highest + out, most)
    tl.store(mass + out, tl.sum(tl.where(inside, tl.exp(x - most), 0.0), axis=0))
    tl.store(place + out, chunk * CHUNK + where)
    tl.store(broken + out, tl.max((~finite).to(tl.int32), axis=0))


@triton.jit
def _conclude(
    highest,
    mass,
    place,
    broken,
    chunks,
    ids,
    finite,
    logprob,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < chunks
    of_chunk = row * chunks + chunk
    high = tl.load(highest + of_chunk, mask=inside, other=_LOWEST)
    most, first = tl.max(high, axis=0, return_indices=True)
    total = tl.sum(tl.load(mass + of_chunk, mask=inside, other=0.0) * tl.exp(high - most), axis=0)
    tl.store(ids + row, tl.load(place + row * chunks + first).to(tl.int64))
    tl.store(finite + row, tl.max(tl.load(broken + of_chunk, mask=inside, other=0), axis=0) == 0)
    tl.store(logprob + row, -tl.log(total))

"""The likeliest token of each row, by a kernel where there is one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Greedy = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def greedy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int64 [R], finite bool [R], logprob float32 [R]) of logits [R, V], in torch.

    ids: the place of the largest logit, of equal ones the lowest; finite: whether all of the row's logits are (where
    not, the other two mean nothing); logprob: of ids, by the softmax of the row in float32.
    """
    values, ids = logits.max(dim=1)  # of equal ones the first, as documented
    logprob = values.float() - logits.float().logsumexp(dim=1)
    return ids, logits.isfinite().all(dim=1), logprob


@cache
def select_greedy(device: torch.device) -> Greedy:
    """`greedy`, or on a CUDA device the kernel that does the same in one pass; with one warning where it cannot be had.

    The first call for a CUDA device compiles the kernel.
    """
    if device.type == "cuda":
        try:
            from loramux.ops.cuda.sampling import greedy as kernel

            kernel(torch.zeros(1, 1, device=device))
            return kernel
        except Exception as reason:  # no triton, no C compiler: what is raised then is of many kinds
            log.warning("Triton is not available (%s); choosing tokens with torch", reason)
    return greedy

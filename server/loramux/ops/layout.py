"""How a tensor lies in memory, as far as a kernel can see it."""

from __future__ import annotations

from torch import Tensor


def strided(t: Tensor, dimension: int, stride: int) -> bool:
    """Whether steps along `dimension` are of `stride` elements.

    One of size 1 has no steps: torch gives it any stride, and `contiguous` leaves it as it is.
    """
    return t.shape[dimension] <= 1 or t.stride(dimension) == stride

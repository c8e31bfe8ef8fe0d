"""Random numbers that depend on nothing but their coordinates: no generator, no state, no batch."""

from __future__ import annotations

_MASK = 2**64 - 1


def _mix(x: int) -> int:
    """splitmix64's finalizer (Steele et al. 2014): a bijection of 64 bits that avalanches."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: for output token `position` of sequence `index`.

    The same three numbers give the same answer for ever: on any machine, in any batch, after any preemption.
    """
    return (_mix(_mix(_mix(seed & _MASK) ^ index) ^ position) >> 11) * 2.0**-53

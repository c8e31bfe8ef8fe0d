"""Whether a memory curve is flat: pure functions on samples.

The first quarter is warm-up (caches fill, the allocator settles) and is left out. Growth is then measured
twice, and the larger one counts: from the median of the second quarter to the median of the last (finds
steps), and as the Theil–Sen slope times the span (finds slow leaks; up to 29 % of the samples may be
outliers). Growth beyond max(16 MiB, 2 %) of the second quarter's median is a leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIB = 1 << 20
MIN_SAMPLES = 12
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Trend:
    """A judged curve. Bytes, but for `slope`: bytes per unit of x."""

    start: float
    growth: float
    slope: float
    bound: float

    @property
    def flat(self) -> bool:
        """Whether growth after warm-up stayed within the bound. Shrinking is flat."""
        return self.growth <= self.bound


def judge(x: Sequence[float], values: Sequence[float]) -> Trend:
    """Judge samples `values` (bytes) taken at rising `x`, e.g. cycles done.

    Raises ValueError for fewer than MIN_SAMPLES samples: too short a run proves nothing.
    """
    if len(values) < MIN_SAMPLES:
        raise ValueError(f"{len(values)} samples cannot show a trend; at least {MIN_SAMPLES} are needed")
    quarter = len(values) // 4
    second = float(np.median(values[quarter : 2 * quarter]))
    last = float(np.median(values[-quarter:]))
    slope = theil_sen(x[quarter:], values[quarter:])
    growth = max(last - second, slope * (x[-1] - x[quarter]))
    return Trend(start=second, growth=growth, slope=slope, bound=max(16.0 * MIB, 0.02 * second))


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs of points with different x; 0.0 without any.

    Thinned to at most 600 points, evenly: 180,000 pairs take milliseconds.
    """
    step = -(-len(x) // 600)
    xs: npt.NDArray[np.float64] = np.asarray(x[::step], np.float64)
    ys: npt.NDArray[np.float64] = np.asarray(y[::step], np.float64)
    i, j = np.triu_indices(len(xs), 1)
    run, rise = xs[j] - xs[i], ys[j] - ys[i]
    return float(np.median(rise[run > 0] / run[run > 0])) if (run > 0).any() else 0.0


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Return the curve as `width` or fewer block characters, from its least to its greatest value."""
    if not values:
        return ""
    parts = np.array_split(np.asarray(values, np.float64), min(width, len(values)))
    means = np.array([part.mean() for part in parts])
    low, high = means.min(), means.max()
    levels = (means - low) / ((high - low) or 1.0) * (len(BARS) - 1)
    return "".join(BARS[round(level)] for level in levels)

"""What counts as a leak: curves of which one knows."""

from __future__ import annotations

import random

import pytest

from loadtest.trend import MIB, judge, sparkline, theil_sen

N = 200
X = [float(i) for i in range(N)]


def noisy(values: list[float]) -> list[float]:
    rng = random.Random(7)
    return [value + rng.gauss(0, 3 * MIB) for value in values]


def test_noise_is_flat() -> None:
    assert judge(X, noisy([500.0 * MIB] * N)).flat


def test_warm_up_is_not_a_leak() -> None:
    assert judge(X, noisy([(300 + min(i, N // 5) * 10) * MIB for i in range(N)])).flat


def test_a_steady_leak_is_found() -> None:
    trend = judge(X, noisy([(500 + i * 0.3) * MIB for i in range(N)]))
    assert not trend.flat
    assert trend.slope == pytest.approx(0.3 * MIB, rel=0.1)
    assert trend.growth == pytest.approx(0.3 * 150 * MIB, rel=0.15)


def test_a_late_step_is_found() -> None:
    """A slope alone misses it: the median pair of points lies on one side of the step."""
    assert not judge(X, noisy([(500 if i < 150 else 540) * MIB for i in range(N)])).flat


def test_spikes_are_no_leak() -> None:
    """A load in flight at the moment of a sample; the mean, or first against last, would be fooled."""
    values = noisy([500.0 * MIB] * N)
    for i in (*range(30, N, 10), N - 1):
        values[i] += 300 * MIB
    assert judge(X, values).flat


def test_shrinking_is_flat() -> None:
    assert judge(X, [(500 - i) * MIB for i in range(N)]).flat


def test_the_bound_grows_with_the_process() -> None:
    assert judge(X, [100.0 * MIB] * N).bound == 16 * MIB
    assert judge(X, [4000.0 * MIB] * N).bound == pytest.approx(80 * MIB)


def test_too_few_samples_prove_nothing() -> None:
    with pytest.raises(ValueError, match="11 samples"):
        judge(X[:11], [1.0] * 11)


def test_a_server_that_stood_still_has_no_slope() -> None:
    """No cycle between two samples: dividing by that would be infinite."""
    assert theil_sen([5.0] * 20, [float(i) for i in range(20)]) == 0.0


def test_long_runs_are_thinned() -> None:
    x = [float(i) for i in range(50_000)]
    assert theil_sen(x, [3.0 * i for i in x]) == pytest.approx(3.0)


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0] * 100, width=10) == "▁" * 10
    assert sparkline([]) == ""

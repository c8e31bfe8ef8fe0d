"""Plans: exact lengths, seeded, and each setting changes only what it names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from statistics import mean, pstdev

import pytest

from loadtest.workload import WorkloadSpec, plan

SPEC = WorkloadSpec(num_prompts=12, prompt_len=7, output_len=5, vocab_size=100, adapters=("a", "b", "c"))


def test_lengths_and_ids() -> None:
    requests = plan(SPEC)
    assert [request.index for request in requests] == list(range(12))
    assert {len(request.prompt_ids) for request in requests} == {7}
    assert {request.output_len for request in requests} == {5}
    assert all(0 <= token < 100 for request in requests for token in request.prompt_ids)
    assert all(isinstance(token, int) for token in requests[0].prompt_ids)


def test_the_seed_decides_everything() -> None:
    assert plan(SPEC) == plan(SPEC)
    assert plan(SPEC) != plan(replace(SPEC, seed=1))


def test_prompts_differ_from_each_other() -> None:
    """Equal prompts would be served from the prefix cache and measure nothing."""
    assert len({request.prompt_ids for request in plan(replace(SPEC, num_prompts=200))}) == 200


@pytest.mark.parametrize(
    "change", [{"request_rate": 5.0}, {"spread": "zipf"}, {"adapters": ()}, {"request_rate": 9.0, "burstiness": 0.5}]
)
def test_prompts_do_not_depend_on_other_settings(change: dict[str, object]) -> None:
    """Drawing all from one stream made a run at another rate a run on other prompts."""
    changed = plan(replace(SPEC, **change))  # type: ignore[arg-type]
    assert [r.prompt_ids for r in changed] == [r.prompt_ids for r in plan(SPEC)]


def test_even_spread_names_every_adapter_in_every_window() -> None:
    names = [request.adapter for request in plan(SPEC)]
    assert all(set(names[i : i + 3]) == {"a", "b", "c"} for i in range(len(names) - 2))


def test_zipf_prefers_the_first_names() -> None:
    spec = replace(SPEC, num_prompts=3000, adapters=tuple("abcdefgh"), spread="zipf")
    counts = Counter(request.adapter for request in plan(spec))
    assert counts["a"] / counts["b"] == pytest.approx(2, rel=0.25)
    assert counts["a"] / counts["h"] == pytest.approx(8, rel=0.4)


def test_uniform_prefers_no_name_and_keeps_no_order() -> None:
    spec = replace(SPEC, num_prompts=3000, adapters=tuple("abcdefgh"), spread="uniform")
    names = [request.adapter for request in plan(spec)]
    counts = Counter(names)
    assert all(counts[name] == pytest.approx(375, rel=0.2) for name in "abcdefgh")
    assert any(len(set(names[i : i + 8])) < 8 for i in range(0, 3000, 8))


def test_no_adapters_is_the_base() -> None:
    assert {request.adapter for request in plan(replace(SPEC, adapters=()))} == {""}


def test_a_closed_loop_has_no_arrivals() -> None:
    assert {request.arrival for request in plan(SPEC)} == {0.0}


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_keep_the_rate_and_have_the_burstiness(burstiness: float, spread: float) -> None:
    """The gamma distribution's coefficient of variation is 1/√shape; 1 is Poisson."""
    spec = replace(SPEC, num_prompts=8000, prompt_len=1, request_rate=20.0, burstiness=burstiness)
    arrivals = [request.arrival for request in plan(spec)]
    intervals = [later - earlier for earlier, later in pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert min(intervals) >= 0.0
    assert mean(intervals) == pytest.approx(1 / 20, rel=0.1)
    assert pstdev(intervals) / mean(intervals) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"num_prompts": 0},
        {"prompt_len": 0},
        {"output_len": 0},
        {"vocab_size": 0},
        {"request_rate": 0.0},
        {"request_rate": float("nan")},
        {"request_rate": float("inf")},
        {"burstiness": 0.0},
        {"burstiness": float("nan")},
    ],
)
def test_impossible_workloads_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SPEC, **change)  # type: ignore[arg-type]

"""The soak passes a sound server and fails each unsound one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.soak import Soak, SoakSpec
from loadtest.target import Target
from loadtest.verdict import SoakLog, verdict
from loadtest.watch import parse_metrics
from tests.loadtest.fakes import Behaviour, FakeServer, serving

SPEC = SoakSpec(
    cycles=96,
    churn=4,
    request_every=4,
    concurrency=2,
    residents=2,
    output_len=3,
    sample_interval=0.01,
    settle_timeout=0.5,
)
VARIANTS = [Path("/x/v0"), Path("/x/v1")]


async def soak(behaviour: Behaviour, spec: SoakSpec = SPEC) -> tuple[dict[str, Any], FakeServer]:
    behaviour = replace(behaviour, first_token=0.002, between=0.002)
    async with serving(behaviour) as at, Target(at.address, at.address) as target:
        return await Soak(target, spec, VARIANTS, at.metrics).run(), at.fake


async def test_a_sound_server_passes() -> None:
    summary, fake = await soak(Behaviour())
    assert summary["problems"] == []
    assert summary["verdict"] == "pass"
    assert summary["cycles"] == 96
    # Every cycle, one replacement in 16 of them, and the residents.
    assert summary["loads"] == fake.loads == 96 + 6 + 2
    assert summary["unloads"] == fake.unloads == 96 + 2
    assert fake.loaded == {}
    assert summary["completed"] > 24  # those of the churn alone
    assert {"", "soak-r0", "soak-c0", "soak-c3"} <= fake.used.keys()


async def test_adapters_are_unloaded_while_requests_use_them() -> None:
    """A soak that unloads only idle adapters never sees a drain, where leases go wrong."""
    summary, fake = await soak(Behaviour())
    assert fake.unloaded_in_use >= 12
    assert summary["unloads_in_use"] >= 12


async def test_clients_that_go_away_are_no_failures() -> None:
    summary, fake = await soak(Behaviour(), replace(SPEC, cancel_every=2))
    assert summary["verdict"] == "pass"
    assert summary["cancelled"] > 5
    assert fake.cancelled > 0


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (Behaviour(fail_adapter="soak-r1"), "× request: RESOURCE_EXHAUSTED"),
        (Behaviour(short_by=1), "× request: OK_WITH_WRONG_LENGTH"),
        (Behaviour(answer_from="another"), "× request: WRONG_ADAPTER"),
        (Behaviour(fail_load_at=50), "1 × cycle: RESOURCE_EXHAUSTED"),
        (Behaviour(forget_to_free=True), "adapters is 1, was 0"),
        (Behaviour(grow_per_load=1 << 20), "resident memory grew"),
        (Behaviour(grow_per_load=64 << 20), "stopped early: the server grew by more than 1,024 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_unsound_server_fails(behaviour: Behaviour, problem: str) -> None:
    summary, _ = await soak(behaviour)
    assert summary["verdict"] == "fail"
    assert any(problem in line for line in summary["problems"]), summary["problems"]


async def test_a_server_that_fails_everything_stops_the_soak() -> None:
    summary, fake = await soak(Behaviour(short_by=3), replace(SPEC, cycles=100_000))
    assert "stopped early after 100 failures" in summary["problems"]
    assert fake.loads < 5_000


def test_a_missing_metric_is_a_problem() -> None:
    """Compared as NaN, a count that nobody exports would pass if NaN were equal to itself."""
    counts = {"vllm:num_requests_running": math.nan}
    problems = verdict(SoakLog(), counts, counts, 1.0)["problems"]
    assert any("vllm:num_requests_running" in problem for problem in problems)


def test_a_run_too_short_to_judge_memory_fails() -> None:
    assert "memory was not judged" in verdict(SoakLog(), {}, {}, 1.0)["problems"][0]


async def test_one_variant_is_not_enough() -> None:
    with pytest.raises(ValueError, match="two different"):
        Soak(Target("127.0.0.1:1", "127.0.0.1:1"), SPEC, VARIANTS[:1], "")


def test_metrics_are_summed_over_labels() -> None:
    page = '# TYPE x gauge\nx{a="1"} 2\nx{a="2"} 3\nvllm:y{m="z"} 0.5\n'
    assert parse_metrics(page) == {"x": 5.0, "vllm:y": 0.5}

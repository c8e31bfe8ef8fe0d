"""What `bench-adapters` sends, counts and concludes."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loadtest.adapters import CONFIG_FILE, WEIGHTS_FILE, link_adapters
from loadtest.cli import main
from loadtest.commands.bench_adapters import registered_lines, write_distinct
from loadtest.console import show_hotswap, show_registered
from loadtest.hotswap import HotSwap, SwapLog, SwapSpec
from loadtest.registered import CONCURRENCY, Popularity, registered_run
from loadtest.target import Target
from loadtest.tier_counts import TierCounts
from loadtest.workload import plan
from tests.loadtest.fakes import VOCAB, Behaviour, FakeServer, serving
from tests.loadtest.test_bench import TINY

NAMES = [f"a-{i:05d}" for i in range(40)]
VARIANTS = [Path(f"/x/v{i}") for i in range(8)]
SPEC = SwapSpec(seconds=0.4, windows=2, streams=4, prompt_len=4, output_len=8, interval=0.01)


# Many registered adapters.


def test_different_adapters_are_written_once(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    first = write_distinct(tmp_path, str(config), 8, seed=0)
    written = [(folder / WEIGHTS_FILE).stat().st_mtime_ns for folder in first]
    assert write_distinct(tmp_path, str(config), 8, seed=0) == first
    assert [(folder / WEIGHTS_FILE).stat().st_mtime_ns for folder in first] == written
    assert not set(write_distinct(tmp_path, str(config), 8, seed=1)) & set(first)
    ranks = [json.loads((folder / CONFIG_FILE).read_text())["r"] for folder in first]
    assert ranks == [8, 16, 32, 64] * 2


def test_thousands_take_the_disk_of_a_few(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    sources = write_distinct(tmp_path, str(config), 8, seed=0)
    linked = link_adapters(tmp_path / "many", sources, count=20)
    assert [folder.name for folder in linked] == NAMES[:20]
    for i, folder in enumerate(linked):
        assert (folder / WEIGHTS_FILE).samefile(sources[i % 8] / WEIGHTS_FILE)
        assert (folder / CONFIG_FILE).read_text() == (sources[i % 8] / CONFIG_FILE).read_text()


def test_no_prompt_comes_twice_for_an_adapter() -> None:
    popularities = (Popularity(40, "zipf"), Popularity(5, "zipf"), Popularity(40, "uniform"))
    sent = [
        (request.adapter, request.prompt_ids)
        for popularity in popularities
        for seed in (0, 1)
        for request in plan(popularity.workload(VOCAB, NAMES, 50, seed))
    ]
    assert len(sent) == len(set(sent)) == 300


def test_tiers_are_counted_from_one_look_to_the_next() -> None:
    before = TierCounts({"device": 5.0, "disk": 5.0}, evictions=1.0, loads=5.0, load_seconds=1.0)
    after = TierCounts({"device": 11.0, "host": 1.0, "disk": 8.0}, evictions=3.0, loads=9.0, load_seconds=3.0)
    assert after.since(before).fields() == {
        "hit_device_percent": 60.0,
        "hit_host_percent": 10.0,
        "hit_disk_percent": 30.0,
        "evictions": 2.0,
        "loads": 4.0,
        "mean_load_ms": 500.0,
    }


def test_a_server_without_tiers_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="it has no tiers"):
        TierCounts.of_page("loramux_adapter_bytes 10\n")


async def run_registered(behaviour: Behaviour) -> tuple[dict[str, Any], FakeServer]:
    async with serving(behaviour) as at, Target(at.address, at.address) as target:
        at.fake.loaded = {name: f"uid of {name}" for name in NAMES}
        workload = Popularity(40, "zipf").workload(VOCAB, NAMES, 48, seed=0)
        return await registered_run(target, at.metrics, workload, warmup=20), at.fake


async def test_a_run_measures_what_comes_after_its_warm_up() -> None:
    summary, fake = await run_registered(Behaviour())
    assert (fake.used.total(), fake.peak) == (68, CONCURRENCY)
    assert (summary["completed"], summary["failed"]) == (48, 0)
    assert summary["hit_device_percent"] == 100.0
    assert {(len(r.token_ids.ids), r.sampling.max_new_tokens) for r in fake.requests[20:]} == {(64, 64)}
    assert all(request.sampling.ignore_eos for request in fake.requests)


async def test_failures_of_a_run_are_counted() -> None:
    summary, _ = await run_registered(Behaviour(fail_adapter=NAMES[0]))
    assert summary["failed"] == summary["errors"]["RESOURCE_EXHAUSTED"] > 0
    assert summary["completed"] + summary["failed"] == 48


def test_ratios_are_of_runs_that_followed_one_another(capsys: pytest.CaptureFixture[str]) -> None:
    def found(*rates: float, failed: int = 0) -> list[dict[str, Any]]:
        tiers = TierCounts({"device": 1.0}, 0.0, 0.0, 0.0).fields()
        latencies = {"median_ttft_ms": 1.0, "p99_ttft_ms": 2.0, "driver_lag_ms_p99": 0.0}
        errors = {"UNAVAILABLE": failed} if failed else {}
        run = {"distinct_adapters": 3, "failed": failed, "errors": errors, **tiers, **latencies}
        return [{"output_throughput": rate, **run} for rate in rates]

    summaries = {
        Popularity(2000, "zipf"): found(90.0, 50.0, 200.0),
        Popularity(5, "zipf"): found(100.0, 100.0, 200.0),
        Popularity(2000, "uniform"): found(50.0, 50.0, 50.0, failed=2),
    }
    lines = {fields["bench"]: fields for fields in registered_lines(summaries)}
    assert list(lines) == [
        "throughput_2000_over_5",
        "throughput_2000_uniform_over_5",
        "registered_2000_zipf",
        "registered_5_zipf",
        "registered_2000_uniform",
    ]
    assert (lines["throughput_2000_over_5"]["value"], lines["throughput_2000_over_5"]["runs"]) == (0.9, [0.9, 0.5, 1.0])
    assert (lines["registered_2000_zipf"]["value"], lines["registered_2000_zipf"]["failed"]) == (90.0, 0)
    assert lines["registered_2000_uniform"]["failed"] == 6
    show_registered({popularity.name: runs for popularity, runs in summaries.items()})
    assert "registered_2000_uniform: 6 failed with UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize(("failed", "status"), [(0, 0), (1, 1)])
def test_a_failure_anywhere_ends_with_1_after_all_lines(
    failed: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A benchmark in CI that ends with 0 while requests fail is a benchmark of refusals."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    command = "loadtest.commands.bench_adapters"
    monkeypatch.setattr(f"{command}.registered", lambda *_: [{"bench": "registered_5_zipf", "failed": failed}])
    monkeypatch.setattr(f"{command}.hotswap", lambda *_: [{"bench": "hotswap_failed", "failed": 0}])
    monkeypatch.setattr(f"{command}.merge", lambda *_: [{"bench": "merge_error_bf16"}])
    options = ["--model", str(config), "--distinct", "8", "--scratch", str(tmp_path / "scratch")]
    monkeypatch.setattr(sys, "argv", ["loadtest", "bench-adapters", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    lines = [json.loads(text)["bench"] for text in capsys.readouterr().out.splitlines()]
    assert lines == ["registered_5_zipf", "hotswap_failed", "merge_error_bf16"]
    assert [path.name for path in (tmp_path / "scratch").iterdir() if path.name.startswith("run-")] == []


# Hot swap.


async def swap(behaviour: Behaviour, spec: SwapSpec = SPEC) -> tuple[SwapLog, FakeServer]:
    behaviour = replace(behaviour, first_token=0.002, between=0.002)
    async with serving(behaviour) as at, Target(at.address, at.address) as target:
        return await HotSwap(target, spec, VARIANTS, ranks=4).run(), at.fake


async def test_operations_come_in_turn_beside_streams_that_never_stop() -> None:
    log, fake = await swap(Behaviour())
    assert log.failures == {}
    assert fake.peak == SPEC.streams
    assert log.operations.total() == 40  # 0.4 s of windows, one due every 10 ms; those that are late are caught up with
    assert max(log.operations.values()) - min(log.operations.values()) <= 1
    assert fake.loads == SPEC.streams + log.operations["load"] + log.operations["replace"]
    assert fake.unloads == log.operations["unload"]
    assert log.quiet_gaps
    assert log.busy_gaps
    assert log.summary()["itl_p99_ratio"] > 0


async def test_replacements_reach_the_streams_own_adapters_and_keep_their_rank() -> None:
    async with serving(Behaviour()) as at, Target(at.address, at.address) as target:
        loaded: list[tuple[str, str]] = []
        real = target.load

        async def load(name: str, source: str) -> str:
            loaded.append((name, source))
            return await real(name, source)

        target.load = load  # type: ignore[method-assign]
        await HotSwap(target, SPEC, VARIANTS, ranks=4).run()
    first, *later = [int(source.removeprefix("/x/v")) for name, source in loaded if name == "swap-stream-01"]
    assert later, "its adapter was never replaced"
    versions = [first, *later]
    assert all(a != b and a % 4 == b % 4 for a, b in zip(versions, later, strict=False))


async def test_a_stall_during_operations_is_seen() -> None:
    """A gap that begins or ends in a window with operations is one of those, whatever its other end lies in."""
    tokens = ((0.0, False), (0.01, False), (0.11, True), (0.12, True), (0.13, False), (0.14, False))  # seconds, busy
    now = 0.0

    async def stream(prompt: object, name: str, output_len: int) -> AsyncIterator[SimpleNamespace]:
        nonlocal now
        for moment, swap._busy in tokens:
            now = moment
            yield SimpleNamespace(tokens=1)

    target: Any = SimpleNamespace(stream=stream)
    swap = HotSwap(target, replace(SPEC, prompt_len=0), VARIANTS, ranks=4, clock=lambda: now)
    await swap._request(0, random.Random(), len(tokens))
    assert swap.log.quiet_gaps == pytest.approx([0.01, 0.01])
    assert swap.log.busy_gaps == pytest.approx([0.1, 0.01, 0.01])
    assert swap.log.summary()["itl_p99_ratio"] > 3


async def test_failed_operations_are_counted() -> None:
    log, _ = await swap(Behaviour(fail_load_at=SPEC.streams + 1))
    assert log.failures == {"replace: RESOURCE_EXHAUSTED": 1}


async def test_failed_requests_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    log, _ = await swap(Behaviour(short_by=1))
    summary = log.summary()
    assert log.completed == 0
    assert summary["failed"] == log.failures["request: OK_WITH_WRONG_LENGTH"] >= SPEC.streams
    show_hotswap(summary)
    assert "request: OK_WITH_WRONG_LENGTH" in capsys.readouterr().err


async def test_one_adapter_of_a_rank_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match="4 ranks need 8 different adapters"):
        HotSwap(Target("127.0.0.1:1", "127.0.0.1:1"), SPEC, VARIANTS[:7], ranks=4)

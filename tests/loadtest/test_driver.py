"""The driver against a server that answers when the test says so; times are on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
from loramux.errors import AdapterNotFound, EngineFault

from loadtest.bench import BenchSpec, bench, choose_adapters, load_folders
from loadtest.driver import DriveResult, StreamOpener, drive, status_of
from loadtest.report import summarize
from loadtest.target import Target
from loadtest.workload import PlannedRequest, WorkloadSpec, plan
from tests.loadtest.fakes import VOCAB, Behaviour, serving
from tests.virtual_time import Clock, run_virtual

WORK = WorkloadSpec(num_prompts=4, prompt_len=6, output_len=5, vocab_size=VOCAB)


async def run(behaviour: Behaviour, workload: WorkloadSpec = WORK, **spec: object) -> dict[str, object]:
    async with serving(behaviour) as at, Target(at.address, at.address) as target:
        for name in workload.adapters:
            await target.load(name, "somewhere")
        return await bench(target, BenchSpec(workload, **spec))  # type: ignore[arg-type]


def answering(first_token: float, between: float, sizes: Sequence[int]) -> StreamOpener:
    """Answers of deltas of `sizes` tokens, after a message without any, as servers send it at once."""

    async def open_stream(request: PlannedRequest) -> AsyncIterator[int]:
        yield 0
        for i, tokens in enumerate(sizes):
            await asyncio.sleep(between if i else first_token)
            yield tokens

    return open_stream


def test_times_are_those_of_the_server() -> None:
    """The first message is not the first token: taking it for one would report a TTFT of nothing."""
    stream = answering(0.1, 0.04, [1] * 5)
    result = run_virtual(lambda clock: drive(stream, plan(WORK), concurrency=4, clock=clock))
    summary = summarize(result.records, result.duration)
    assert (summary["completed"], summary["failed"]) == (4, 0)
    assert summary["median_ttft_ms"] == pytest.approx(100)
    assert summary["median_itl_ms"] == pytest.approx(40)
    assert summary["median_tpot_ms"] == pytest.approx(40)
    assert summary["median_e2el_ms"] == pytest.approx(100 + 4 * 40)
    assert summary["total_input_tokens"] == 24
    assert summary["total_output_tokens"] == 20


def test_coalesced_deltas() -> None:
    stream = answering(0.0, 0.06, [1, 2, 1, 1])
    result = run_virtual(lambda clock: drive(stream, plan(WORK), concurrency=4, clock=clock))
    summary = summarize(result.records, result.duration)
    assert summary["total_output_tokens"] == 20
    assert summary["tokens_per_delta"] == pytest.approx(5 / 4)
    assert summary["median_itl_ms"] == pytest.approx(60)
    assert summary["median_tpot_ms"] == pytest.approx(60 * 3 / 4)


async def test_a_message_without_tokens_is_none_of_the_deltas() -> None:
    summary = await run(Behaviour(delta_sizes=(1, 2)), concurrency=4)
    assert summary["total_output_tokens"] == 20
    assert summary["tokens_per_delta"] == pytest.approx(5 / 4)  # 1 + 2 + 1 + 1 (two asked for, one left)


async def test_a_closed_loop_keeps_exactly_so_many_in_flight() -> None:
    async with serving(Behaviour(between=0.01)) as at, Target(at.address, at.address) as target:
        spec = BenchSpec(replace(WORK, num_prompts=12), concurrency=3)
        assert (await bench(target, spec))["completed"] == 12
        assert at.fake.peak == 3


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """A driver that waits sends slower to a slow server, and so hides how slow it is."""
    arrivals: list[float] = []

    async def main(clock: Clock) -> DriveResult:
        async def open_stream(request: PlannedRequest) -> AsyncIterator[int]:
            arrivals.append(clock())
            await asyncio.sleep(100.0)
            yield 5

        return await drive(open_stream, requests, clock=clock)

    requests = plan(replace(WORK, num_prompts=10, request_rate=100.0))
    result = run_virtual(main)
    assert sorted(arrivals) == pytest.approx(sorted(request.arrival for request in requests))
    assert result.duration == pytest.approx(100.0 + max(request.arrival for request in requests))


def test_an_open_loop_counts_from_the_planned_arrival() -> None:
    """If the driver is late, the wait is in the latency: otherwise a stall of the driver would vanish from it."""

    async def main(clock: Clock) -> DriveResult:
        async def open_stream(request: PlannedRequest) -> AsyncIterator[int]:
            if request.index == 0:
                clock.pass_by(0.2)  # the driver's loop stands still
            yield 1

        return await drive(open_stream, requests, clock=clock)

    requests = [PlannedRequest(i, i * 0.1, "", (1,), 1) for i in range(2)]
    result = run_virtual(main)
    assert [record.ttft for record in result.records] == pytest.approx([0.2, 0.1])
    assert result.lag_ms_p99 >= 100


async def test_adapters_are_named_and_counted() -> None:
    async with serving(Behaviour()) as at, Target(at.address, at.address) as target:
        for name in ("b-0", "a-1", "a-0", "a-2"):
            await target.load(name, "somewhere")
        names = tuple(await choose_adapters(target, 3, "a-"))
        assert names == ("a-0", "a-1", "a-2")
        summary = await bench(target, BenchSpec(replace(WORK, num_prompts=6, adapters=names)))
        assert summary["distinct_adapters"] == 3
        assert at.fake.used == {"a-0": 2, "a-1": 2, "a-2": 2}


async def test_what_is_asked_for_is_sent() -> None:
    async with serving(Behaviour()) as at, Target(at.address, at.address) as target:
        spec = BenchSpec(WORK, temperature=0.5, ignore_eos=True)
        await bench(target, spec)
        sent = sorted(at.fake.requests, key=lambda request: request.sampling.seed)
        assert [tuple(request.token_ids.ids) for request in sent] == [r.prompt_ids for r in plan(WORK)]
        assert {request.sampling.max_new_tokens for request in sent} == {5}
        assert {request.sampling.temperature for request in sent} == {0.5}
        assert {request.sampling.ignore_eos for request in sent} == {True}


async def test_failures_are_counted_by_status_and_the_rest_goes_on() -> None:
    workload = replace(WORK, num_prompts=6, adapters=("good", "bad"))
    summary = await run(Behaviour(fail_adapter="bad"), workload)
    assert (summary["completed"], summary["failed"]) == (3, 3)
    assert summary["errors"] == {"RESOURCE_EXHAUSTED": 3}
    assert summary["distinct_adapters"] == 1


@pytest.mark.parametrize(("short_by", "word"), [(5, "OK_WITHOUT_TOKENS"), (2, "OK_WITH_WRONG_LENGTH")])
async def test_a_stream_that_ends_well_too_early_is_a_failure(short_by: int, word: str) -> None:
    """The worst fault of a gRPC server: an internal failure that looks like an empty success."""
    summary = await run(Behaviour(short_by=short_by))
    assert summary["errors"] == {word: 4}


async def test_short_answers_are_fine_where_eos_counts() -> None:
    summary = await run(Behaviour(short_by=2), ignore_eos=False)
    assert (summary["completed"], summary["total_output_tokens"]) == (4, 12)


async def test_the_warm_up_is_not_measured_and_uses_every_adapter() -> None:
    workload = replace(WORK, num_prompts=2, adapters=("a", "b", "c"))
    async with serving(Behaviour()) as at, Target(at.address, at.address) as target:
        for name in workload.adapters:
            await target.load(name, "somewhere")
        summary = await bench(target, BenchSpec(workload, warmup=1))
        assert summary["completed"] == 2
        assert at.fake.used == {"a": 2, "b": 2, "c": 1}
        prompts = [tuple(request.token_ids.ids) for request in at.fake.requests]
        assert len(set(prompts)) == 5  # none of the warm-up's would be found in a prefix cache


async def test_loading_reports_the_first_failure() -> None:
    async with serving(Behaviour(fail_load_at=1)) as at, Target(at.address, at.address) as target:
        from pathlib import Path

        with pytest.raises(Exception, match="a bad adapter"):
            await load_folders(target, [Path("/x/one"), Path("/x/two"), Path("/x/three")])


async def test_an_interrupted_run_leaves_no_task_behind() -> None:
    """Ctrl-C must stop the heartbeat and the streams, or the loop never ends."""

    async def open_stream(request: PlannedRequest) -> AsyncIterator[int]:
        await asyncio.sleep(60)
        yield 1

    task = asyncio.create_task(drive(open_stream, plan(WORK), concurrency=4))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_status_names() -> None:
    assert status_of(AdapterNotFound("x")) == "NOT_FOUND"
    assert status_of(EngineFault("x")) == "INTERNAL"
    assert status_of(RuntimeError("x")) == "RuntimeError"

"""/metrics and /healthz: names, values, and that a scrape is not felt."""

from __future__ import annotations

import asyncio
import http.client
import time
from pathlib import Path

import pytest
from loramux.errors import AdapterNotFound, StartupError
from loramux.http.metrics_server import MetricsServer
from loramux.metrics import MAX_ADAPTER_LABELS, MIN_IDLE, OTHER_ADAPTERS, Metrics, Snapshot
from prometheus_client.parser import text_string_to_metric_families

from tests.patience import PATIENCE
from tests.rpc.stack import Running, endless, running, write_adapter

GATEWAY = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:lora_requests_info",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
}


def get(address: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


async def scrape(r: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    status, text = await asyncio.to_thread(get, r.addresses.metrics, "/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labels(**values: str) -> frozenset[tuple[str, str]]:
    return frozenset(values.items())


MODEL = labels(model_name="smollm2")


@pytest.fixture
def free_port() -> int:
    server = MetricsServer("127.0.0.1", 0, render=bytes, serving=lambda: True)
    server.stop()
    return server.port


async def test_counts_are_those_of_what_happened(tmp_path: Path, free_port: int) -> None:
    write_adapter(tmp_path, "broken", b"bad")
    async with running(tmp_path, adapters=("a",), metrics_port=free_port) as r:
        await r.client.generate("hello", adapter="a", max_new_tokens=6, ignore_eos=True)
        await r.client.generate("hello", max_new_tokens=4, ignore_eos=True)
        with pytest.raises(AdapterNotFound):
            await r.client.generate("hello", adapter="no such name")
        await asyncio.gather(r.admin.load("broken"), return_exceptions=True)
        now = await scrape(r)
        assert {name.removesuffix("_total").removesuffix("_count") for name, _ in now} >= GATEWAY
        assert now["vllm:prompt_tokens_total", MODEL] == 10
        assert now["vllm:generation_tokens_total", MODEL] == 10
        assert now["vllm:request_success_total", MODEL | labels(finished_reason="length")] == 2
        assert now["vllm:time_to_first_token_seconds_count", MODEL] == 2
        assert now["vllm:e2e_request_latency_seconds_count", MODEL] == 2
        assert now["loramux_adapter_requests_total", labels(adapter="a")] == 1
        assert now["loramux_adapter_generated_tokens_total", labels(adapter="a")] == 6
        assert now["loramux_requests_failed_total", labels(reason="ADAPTER_NOT_FOUND")] == 1
        assert now["loramux_adapters", labels(state="ready")] == 1
        assert now["loramux_adapters", labels(state="failed")] == 1
        assert now["loramux_adapter_load_seconds_count", labels()] == 1
        assert now["loramux_adapter_load_failures_total", labels(reason="INVALID_ADAPTER")] == 1
        assert now["loramux_adapter_bytes", labels()] == len(b"weights of a")
        assert now["loramux_steps_total", labels()] > 0
        assert now["loramux_late_compilations_total", labels()] == 0
        assert now["loramux_step_seconds_total", labels(part="forward")] > 0
        assert now["loramux_healthy", labels()] == 1
        assert now["process_resident_memory_bytes", labels()] > 0
        assert now["process_open_fds", labels()] > 0
        assert {"version", "python"} in [set(dict(pairs)) for name, pairs in now if name == "loramux_build_info"]
        assert not any("no such name" in value for _, pairs in now for _, value in pairs)
        await r.admin.unload("a")
        async with asyncio.timeout(PATIENCE):
            while any(("adapter", "a") in pairs for _, pairs in await scrape(r)):  # counts may be a little old
                await asyncio.sleep(0.05)


async def test_running_adapters_are_named_for_gateways(tmp_path: Path, free_port: int) -> None:
    async with running(tmp_path, adapters=("a", "b"), metrics_port=free_port) as r:
        stream = r.client.stream("hello", mix={"b": 1, "a": 1}, max_new_tokens=240, ignore_eos=True)
        await anext(stream)
        await anext(stream)
        info = [dict(pairs) for name, pairs in await scrape(r) if name == "vllm:lora_requests_info"]
        assert info == [{"max_lora": "64", "running_lora_adapters": "a,b", "waiting_lora_adapters": ""}]
        await stream.aclose()


PROBES = ("/healthz", "/health", "/readyz")


async def test_health_page_follows_the_server(tmp_path: Path, free_port: int) -> None:
    async with running(tmp_path, script=endless, metrics_port=free_port) as r:
        for path in (*PROBES, "/livez"):
            assert await asyncio.to_thread(get, r.addresses.metrics, path) == (200, "ok\n")
        assert (await asyncio.to_thread(get, r.addresses.metrics, "/"))[0] == 404
        r.engine.healthy = False
        for path in PROBES:
            assert await asyncio.to_thread(get, r.addresses.metrics, path) == (503, "not serving\n")
        assert (await asyncio.to_thread(get, r.addresses.metrics, "/livez"))[0] == 200  # the process is there
    with pytest.raises(ConnectionRefusedError):
        get(r.addresses.metrics, "/healthz")


async def test_a_busy_event_loop_does_not_block_a_scrape(tmp_path: Path, free_port: int) -> None:
    async with running(tmp_path, metrics_port=free_port) as r:
        task = asyncio.create_task(asyncio.to_thread(get, r.addresses.metrics, "/metrics"))
        await asyncio.sleep(0)
        time.sleep(0.8)  # noqa: ASYNC251 - the fault under test
        assert (await task)[0] == 200


def test_a_scrape_is_not_felt() -> None:
    """What is counted is rendered anew only after MIN_IDLE times as long as rendering took, however often one asks."""
    times = iter([0.0, 2.0, 3.0, 2.0 + 2 * MIN_IDLE - 0.1, 2.0 + 2 * MIN_IDLE, 50.0])  # it takes 2 seconds at first
    metrics = Metrics("m", clock=lambda: next(times))
    metrics.set_source(lambda: Snapshot(running=3, step_seconds={"forward": 1.0}))
    finish(metrics, "adapter-0")
    first = metrics.render()
    finish(metrics, "adapter-1")
    assert b"adapter-0" in first
    assert b"adapter-1" not in metrics.render()
    assert b"adapter-1" not in metrics.render()
    assert b"adapter-1" in metrics.render()


def finish(metrics: Metrics, adapter: str) -> None:
    metrics.prompt_computed(1, 0.1)
    metrics.delivered(2, (adapter,))
    metrics.ended("OK", "stop", (adapter,))
    metrics.left_the_engine("stop")
    metrics.answered(total_seconds=0.2, queue_seconds=0.0, adapter_seconds=0.0)


def test_adapter_labels_are_capped_and_given_back() -> None:
    """A counter for every name that was ever loaded grows for ever."""
    metrics = Metrics("m")
    for i in range(MAX_ADAPTER_LABELS + 5):
        finish(metrics, f"adapter-{i}")
    sample = metrics.registry.get_sample_value
    assert sample("loramux_adapter_requests_total", {"adapter": OTHER_ADAPTERS}) == 5
    metrics.forget_adapter("adapter-0")
    assert sample("loramux_adapter_requests_total", {"adapter": "adapter-0"}) is None
    finish(metrics, "new")
    assert sample("loramux_adapter_requests_total", {"adapter": "new"}) == 1
    metrics.forget_adapter("never seen")


def test_an_adapter_that_is_gone_gets_no_label_again() -> None:
    """The last event of a request came after its adapter was forgotten: the label was there again, for good."""
    metrics, there = Metrics("m"), {"a"}
    metrics.set_known(there.__contains__)
    metrics.delivered(2, ("a",))
    there.clear()
    metrics.forget_adapter("a")
    metrics.delivered(3, ("a",))
    metrics.ended("OK", "stop", ("a",))
    sample = metrics.registry.get_sample_value
    assert sample("loramux_adapter_generated_tokens_total", {"adapter": "a"}) is None
    assert sample("loramux_adapter_generated_tokens_total", {"adapter": OTHER_ADAPTERS}) == 3
    assert sample("loramux_adapter_requests_total", {"adapter": OTHER_ADAPTERS}) == 1


async def test_names_that_callers_invent_become_no_series(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",)) as r:
        await r.client.generate("hello", adapter="a", max_new_tokens=1)

        def names() -> set[str]:
            return {f"{s.name}{s.labels}" for family in r.server.metrics.registry.collect() for s in family.samples}

        with pytest.raises(AdapterNotFound):
            await r.client.generate("hello", adapter="invented")
        before = names()
        for i in range(20):
            with pytest.raises(AdapterNotFound):
                await r.client.generate("hello", adapter=f"invented-{i}", request_id=f"id-{i}")
        assert names() == before
        assert not any("invented" in name for name in before)


def test_a_taken_port_says_so() -> None:
    server = MetricsServer("127.0.0.1", 0, render=bytes, serving=lambda: True)
    try:
        with pytest.raises(StartupError, match=f"--metrics-port {server.port}: cannot listen"):
            MetricsServer("127.0.0.1", server.port, render=bytes, serving=lambda: True)
    finally:
        server.stop()

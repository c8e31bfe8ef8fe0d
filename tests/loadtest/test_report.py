"""The arithmetic of the report, on streams whose times are written down."""

from __future__ import annotations

import pytest

from loadtest.report import RequestRecord, latency_fields, rounded, summarize


def record(start: float, *deltas: tuple[float, int], end: float, adapter: str = "", error: str = "") -> RequestRecord:
    return RequestRecord(adapter, 10, start, list(deltas), end, error)


def test_latencies_of_one_request() -> None:
    summary = summarize([record(1.0, (1.5, 1), (1.6, 1), (1.9, 1), end=2.0)], duration=1.0)
    assert summary["mean_ttft_ms"] == pytest.approx(500)
    assert summary["mean_tpot_ms"] == pytest.approx(200)  # 0.4 s for the two tokens after the first
    assert summary["mean_itl_ms"] == pytest.approx(200)
    assert summary["p99_itl_ms"] == pytest.approx(100 + 0.99 * 200)
    assert summary["mean_e2el_ms"] == pytest.approx(1000)


def test_a_coalesced_delta_is_one_gap_but_all_its_tokens() -> None:
    """Spreading a delta's gap over its tokens would hide a stall; dropping its tokens would slow TPOT fourfold."""
    summary = summarize([record(0.0, (0.1, 1), (0.5, 4), end=0.5)], duration=0.5)
    assert summary["mean_itl_ms"] == pytest.approx(400)
    assert summary["mean_tpot_ms"] == pytest.approx(100)
    assert summary["tokens_per_delta"] == pytest.approx(2.5)
    assert summary["total_output_tokens"] == 5


def test_one_token_has_no_tpot() -> None:
    """A request of one token must not enter TPOT as a zero and flatter the mean."""
    one, two = record(0.0, (0.1, 1), end=0.1), record(0.0, (0.1, 1), (0.3, 1), end=0.3)
    assert one.tpot is None
    assert summarize([one, two], 1.0)["mean_tpot_ms"] == pytest.approx(200)


def test_failures_count_but_do_not_measure() -> None:
    """A refusal is fast; among the latencies it would make an overloaded server look quick."""
    records = [
        record(0.0, (1.0, 1), end=1.0, adapter="a"),
        record(0.0, end=0.001, adapter="b", error="NOT_FOUND"),
        record(0.0, (0.1, 7), end=0.2, adapter="c", error="INTERNAL"),
        record(0.0, end=0.001, adapter="b", error="NOT_FOUND"),
    ]
    summary = summarize(records, duration=2.0)
    assert (summary["completed"], summary["failed"]) == (1, 3)
    assert summary["errors"] == {"NOT_FOUND": 2, "INTERNAL": 1}
    assert summary["distinct_adapters"] == 1
    assert summary["total_output_tokens"] == 1
    assert summary["mean_e2el_ms"] == pytest.approx(1000)
    assert summary["output_throughput"] == pytest.approx(0.5)
    assert summary["request_throughput"] == pytest.approx(0.5)
    assert summary["total_token_throughput"] == pytest.approx(5.5)


def test_distinct_adapters_leaves_out_the_base() -> None:
    records = [record(0.0, (1.0, 1), end=1.0, adapter=name) for name in ("", "a", "a", "b")]
    assert summarize(records, 1.0)["distinct_adapters"] == 2


def test_percentiles_interpolate_as_numpy_does() -> None:
    fields = latency_fields("x", [i / 1000 for i in range(1, 101)])
    assert fields["median_x_ms"] == pytest.approx(50.5)
    assert fields["p90_x_ms"] == pytest.approx(90.1)
    assert fields["p99_x_ms"] == pytest.approx(99.01)
    assert fields["std_x_ms"] == pytest.approx(28.866, abs=1e-3)


def test_nothing_completed_is_zeros_not_a_crash() -> None:
    summary = summarize([record(0.0, end=0.1, error="UNAVAILABLE")], duration=0.0)
    assert summary["p99_ttft_ms"] == 0.0
    assert summary["output_throughput"] == 0.0


def test_every_field_of_vllm_bench_serve_is_there() -> None:
    """Dashboards and scripts that read `vllm bench serve --save-result` read ours unchanged."""
    summary = summarize([record(0.0, (0.1, 2), end=0.2)], 1.0)
    names = {"completed", "failed", "total_input_tokens", "total_output_tokens", "duration"}
    names |= {"request_throughput", "output_throughput", "total_token_throughput"}
    for metric in ("ttft", "tpot", "itl", "e2el"):
        names |= {f"{statistic}_{metric}_ms" for statistic in ("mean", "median", "std", "p90", "p99")}
    assert names <= summary.keys()


def test_rounded_leaves_integers_and_nested_values() -> None:
    assert rounded({"a": 1.23456789, "b": 3, "c": {"d": 0.123456}}) == {"a": 1.2346, "b": 3, "c": {"d": 0.123456}}

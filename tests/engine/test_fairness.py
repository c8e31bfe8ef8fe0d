"""Who runs when: nobody waits for ever, nobody waits for somebody else's adapter."""

from __future__ import annotations

import pytest
from loramux.engine.group import Group
from loramux.engine.request import AdapterUse, SequenceFinished
from loramux.engine.sequence import Sequence
from loramux.engine.settings import EngineSettings
from loramux.errors import AdapterUnavailable, Cancelled, InvalidRequest

from .fakes import Bench, FakeAdapter, FakeModel, adapter, expected, request


def _finish_order(bench: Bench) -> list[str]:
    return [r.request_id for r in bench.finished]


def test_first_come_first_served() -> None:
    bench = Bench(max_batch_rows=1)
    for i in range(4):
        bench.submit(request([i], request_id=str(i), arrival=float(10 - i)))
    bench.run()
    assert _finish_order(bench) == ["3", "2", "1", "0"], "by arrival, not by the order of submission"


def _steps_until_large_is_done(bench: Bench, late_prompt: int) -> int:
    """A prompt of 64 tokens against a new small request at every step, of lengths that never end together."""
    bench.submit(*(request([i, i + 1], max_new_tokens=3 + 2 * i) for i in range(4)))
    bench.engine.step()
    large = request(range(64), max_new_tokens=2)
    bench.submit(large)
    for i in range(300):
        bench.now += 0.01
        bench.submit(request([i % 256] * late_prompt, max_new_tokens=3 + i % 7, cache_salt=str(i)))
        bench.engine.step()
        if large in bench.finished:
            assert bench.tokens(large) == expected(large.prompt_ids, count=2)
            bench.run()
            bench.assert_baseline()
            return i
    raise AssertionError("starved")


def test_what_does_not_fit_is_not_overtaken_for_ever() -> None:
    """vLLM #16876: requests that came later overtook one that did not fit yet, for as long as they kept coming."""
    bench = Bench(FakeModel(num_kv_blocks=20), max_batch_rows=4, max_batch_tokens=16)
    assert _steps_until_large_is_done(bench, late_prompt=2) < 25


def test_started_prompt_keeps_its_share_of_the_budget() -> None:
    """Each late prompt would take the whole budget of a step, if it came before the chunks of an earlier one."""
    bench = Bench(max_batch_rows=8, max_batch_tokens=16)
    assert _steps_until_large_is_done(bench, late_prompt=16) < 8


def test_running_sequences_get_a_token_in_every_step() -> None:
    """A long prompt is chunked so that it does not stop those who are generating."""
    bench = Bench(max_batch_tokens=8)
    running = request([1], max_new_tokens=20)
    bench.submit(running)
    bench.engine.step()
    bench.submit(request(range(70)))
    for made in range(2, 11):
        bench.engine.step()
        assert len(bench.tokens(running)) == made
        assert bench.model.steps[-1] == (2, 8)


def test_chunked_prefill_counts_as_a_row() -> None:
    """SGLang #23141: one sequence too many was admitted when one in the middle of its prompt was not counted."""
    bench = Bench(max_batch_rows=2, max_batch_tokens=16)
    bench.submit(request(range(40), arrival=1.0), *(request([i], arrival=2.0 + i) for i in range(5)))
    while bench.engine.step():
        assert len(bench.engine.scheduler.running) <= 2
    assert max(rows for rows, _ in bench.model.steps) == 2
    assert max(tokens for _, tokens in bench.model.steps) <= 16
    bench.assert_baseline()


def test_higher_priority_goes_first() -> None:
    bench = Bench(max_batch_rows=1, priority_seconds=1.0)
    bench.submit(
        request([1], request_id="normal", arrival=10.0),
        request([2], request_id="low", arrival=9.0, priority=-5),
        request([3], request_id="high", arrival=12.0, priority=5),
    )
    bench.run()
    assert _finish_order(bench) == ["high", "normal", "low"]


def test_low_priority_ages() -> None:
    """A stream of high priorities holds a low one up for a bounded time: points x priority_seconds."""
    bench = Bench(max_batch_rows=1, priority_seconds=1.0)
    low = request([1], request_id="low", arrival=1000.0, priority=-3)
    bench.submit(low)
    for i in range(200):
        bench.submit(request([i], request_id="high", arrival=bench.now, priority=3, max_new_tokens=1))
        bench.engine.step()
        bench.now += 0.1
        if low in bench.finished:
            break
    assert low in bench.finished
    assert 1006.0 <= bench.now < 1008.0


def test_loading_adapter_delays_nobody_and_keeps_its_place() -> None:
    """vLLM #31941, LoRAX: one load blocked the whole engine."""
    bench = Bench(max_batch_rows=1)
    slow = FakeAdapter("slow", "slow-1")
    waits = request([1], slow, request_id="waits")
    bench.submit(waits, request([2], request_id="second"), request([3], request_id="third"))
    while "second" not in _finish_order(bench):
        assert bench.engine.step()
        bench.now += 0.25
    loaded_at = bench.now
    slow.load()
    bench.run()
    assert _finish_order(bench) == ["second", "waits", "third"]
    assert bench.tokens(waits) == expected([1], waits.adapters)
    timings = bench.end(waits).timings
    assert timings.adapter_load == pytest.approx(loaded_at - 1000.0)
    assert timings.queue == pytest.approx(0.0)


def test_queue_time_is_not_load_time() -> None:
    bench = Bench(max_batch_rows=1)
    slow = FakeAdapter("slow", "slow-1")
    first, waits = request([1], max_new_tokens=4), request([1], slow, max_new_tokens=3)
    bench.submit(first, waits)
    for step in range(7):
        if step == 2:
            slow.load()
        bench.engine.step()
        bench.now += 1.0
    end = bench.end(waits).timings
    assert (end.adapter_load, end.queue, end.prefill, end.decode) == pytest.approx((2.0, 2.0, 0.0, 2.0))


def test_only_loading_requests_leave_the_engine_idle() -> None:
    bench = Bench()
    slow = FakeAdapter("slow", "slow-1")
    r = request([1], slow)
    bench.submit(r)
    assert not bench.engine.step()
    assert bench.engine.idle_seconds() == EngineSettings().load_poll_seconds
    slow.load()
    bench.run()
    assert bench.end(r)
    assert bench.engine.idle_seconds() is None


def test_failed_load_fails_its_requests_only() -> None:
    bench = Bench()
    broken = FakeAdapter("broken", "broken-1")
    bad = [request([i], broken) for i in range(2)]
    good = request([1], adapter("good"))
    bench.submit(*bad, good)
    bench.engine.step()
    broken.error = AdapterUnavailable("adapter 'broken' is corrupt")
    bench.run()
    assert all(bench.error(r) is broken.error for r in bad)
    assert isinstance(bench.events[good][-1], SequenceFinished)
    bench.assert_baseline()


def test_a_mix_that_turns_out_to_be_dora_is_refused_before_it_starts() -> None:
    """While it loads nobody knows."""
    bench = Bench()
    dora = FakeAdapter("dora", "dora-1")
    mixed = request([1], AdapterUse(dora, 0.5), AdapterUse(adapter("a"), 0.5))
    alone = request([2], dora)
    bench.submit(mixed, alone)
    assert not bench.engine.step()
    dora.mixable = False
    dora.load()
    bench.run()
    assert isinstance(bench.error(mixed), InvalidRequest)
    assert bench.tokens(mixed) == []
    assert bench.tokens(alone) == expected([2], alone.adapters)
    bench.assert_baseline()


def test_a_mix_that_is_known_late_is_refused_too() -> None:
    """Loaded between the door and the engine's first look."""
    bench = Bench()
    dora = FakeAdapter("dora", "dora-1")
    mixed = request([1], AdapterUse(dora, 0.5))
    bench.submit(mixed)
    dora.mixable = False
    dora.load()
    bench.run()
    assert isinstance(bench.error(mixed), InvalidRequest)
    bench.assert_baseline()


def test_those_behind_what_does_not_fit_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand requests of sixteen sequences each may wait; every step went through all of them."""
    bench = Bench(max_batch_rows=2)
    bench.submit(*(request([i], n=16, request_id=str(i)) for i in range(20)))
    looks = 0
    plain = Group.may_start

    def counting(group: Group, seq: Sequence) -> bool:
        nonlocal looks
        looks += 1
        return plain(group, seq)

    monkeypatch.setattr(Group, "may_start", counting)
    bench.engine.step()
    assert len(bench.engine.scheduler.running) == 2
    assert looks <= 2 * 16 + 1
    bench.engine.step()
    assert looks <= 2 * 16 + 2
    bench.run()
    bench.assert_baseline()


def test_requests_leave_the_queue_in_any_order() -> None:
    bench = Bench(max_batch_rows=1)
    requests = [request([i], n=3, request_id=str(i), arrival=5.0, priority=i % 4) for i in range(12)]
    bench.submit(*requests)
    bench.engine.step()
    for i in (7, 11, 0, 3, 5):
        bench.engine.abort(requests[i], Cancelled("gone"))
        bench.engine.check_books()
    bench.run()
    bench.assert_baseline()


def test_stats_count_requests_by_adapter() -> None:
    bench = Bench(max_batch_rows=2)
    bench.submit(request([1], adapter("a")), request([2]), request([3], adapter("a")))
    bench.engine.step()
    stats = bench.engine.stats()
    assert (stats.running, stats.waiting) == (2, 1)
    assert stats.running_adapters == {"a": 1, "": 1}
    assert stats.waiting_adapters == {"a": 1}
    assert stats.kv_blocks_used == 2


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        EngineSettings(max_batch_rows=64, max_batch_tokens=63)

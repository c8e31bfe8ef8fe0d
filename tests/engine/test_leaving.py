"""Every way out of the engine leaves nothing behind and harms nobody else."""

from __future__ import annotations

import weakref

import pytest
import torch
from loramux.engine.sampler import Sampled, sample
from loramux.engine.sequence import Sequence
from loramux.errors import Cancelled, DeadlineExceeded, EngineFault, Overloaded
from torch import Tensor

from .fakes import Bench, FakeAdapter, FakeModel, adapter, expected, request

GONE = Cancelled("the client went away")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("steps", range(12))
def test_abort_after_any_number_of_steps(n: int, steps: int) -> None:
    """SGLang #25864, #34205, #36894: a count drifted after an abort, or with n > 1, and an unload hung for ever.

    Ten tokens a step for a prompt of 30: queued, three chunks, the fork, and decoding are all met.
    """
    bench = Bench(max_batch_tokens=10)
    r, other = request(range(30), adapter("a"), n=n, max_new_tokens=5), request([1, 2], max_new_tokens=12)
    bench.submit(r, other)
    for _ in range(steps):
        bench.engine.step()
    bench.engine.abort(r, GONE)
    bench.engine.abort(r, GONE)
    bench.engine.check_books()
    assert bench.finished.count(r) == 1
    bench.run()
    assert bench.tokens(other) == expected(other.prompt_ids, count=12)
    bench.assert_baseline()


def test_abort_while_the_adapter_loads() -> None:
    bench = Bench()
    r = request([1], FakeAdapter("slow", "slow-1"))
    bench.submit(r)
    bench.engine.step()
    bench.engine.abort(r, GONE)
    assert bench.error(r) is GONE
    bench.assert_baseline()


def test_abort_while_preempted() -> None:
    bench = Bench(FakeModel(num_kv_blocks=12))
    requests = [request(range(10), max_new_tokens=20, arrival=1.0 + i, cache_salt=str(i)) for i in range(3)]
    bench.submit(*requests)
    while bench.engine.stats().preemptions == 0:
        assert bench.engine.step()
    bench.engine.abort(requests[-1], GONE)
    bench.run()
    assert bench.error(requests[-1]) is GONE
    assert bench.tokens(requests[0]) == expected(range(10), count=20)
    bench.assert_baseline()


def test_same_request_id_twice() -> None:
    """Ids are the callers' own: a retry may use one while the first is still here."""
    bench = Bench()
    one, two = request([1], request_id="same"), request([2], request_id="same")
    bench.submit(one, two)
    bench.engine.step()
    bench.engine.abort(one, GONE)
    bench.run()
    assert bench.tokens(two) == expected([2])
    bench.assert_baseline()


def test_deadline_while_queued() -> None:
    bench = Bench(max_batch_rows=1)
    running, queued = request([1], max_new_tokens=20), request([2], deadline=1001.0)
    bench.submit(running, queued)
    bench.engine.step()
    assert bench.engine.idle_seconds() == 1.0
    bench.now = 1001.0
    bench.engine.step()
    assert isinstance(bench.error(queued), DeadlineExceeded)
    assert "queued" in bench.error(queued).message
    bench.run()
    assert bench.tokens(running) == expected([1], count=20)
    bench.assert_baseline()


@pytest.mark.parametrize("steps", [1, 5])
def test_deadline_while_running(steps: int) -> None:
    bench = Bench(max_batch_tokens=8)
    r = request(range(20), deadline=1001.0, max_new_tokens=50)
    bench.submit(r)
    for _ in range(steps):
        bench.engine.step()
    bench.now = 1001.5
    assert not bench.engine.step()
    assert isinstance(bench.error(r), DeadlineExceeded)
    assert "running" in bench.error(r).message
    bench.assert_baseline()


def test_fault_in_the_model_fails_that_step_only() -> None:
    """Halves of the step are tried, so it takes a fault that stays: the step, two halves, a token of the base."""
    bench = Bench(max_batch_rows=2)
    victims = [request([1, 2, 3, 4, 5]), request([2])]
    waiting = request([3])
    bench.submit(*victims, waiting)
    bench.engine.step()
    bench.model.fail_steps = 4
    assert bench.engine.step()
    for r in victims:
        assert isinstance(bench.error(r), EngineFault)
        assert "secret" not in bench.error(r).message
    assert bench.engine.healthy
    bench.run()
    assert bench.tokens(waiting) == expected([3])
    bench.assert_baseline()


def test_fault_that_passes_harms_nobody() -> None:
    bench = Bench()
    requests = [request([1, 2, 3, 4, 5]), request([2], n=2)]
    bench.submit(*requests)
    bench.engine.step()
    bench.model.fail_steps = 1
    bench.run()
    assert [bench.tokens(r) for r in requests] == [expected(r.prompt_ids) for r in requests]
    bench.assert_baseline()


def test_half_written_blocks_are_not_offered_to_others() -> None:
    """A prefill that failed must not leave its prompt in the prefix cache."""
    bench = Bench()
    bench.model.fail_steps = 1
    bench.submit(request(range(20)))
    bench.run()
    again = request(range(20))
    bench.submit(again)
    bench.run()
    assert bench.end(again).usage.cached_prompt_tokens == 0
    assert bench.tokens(again) == expected(range(20))


def test_repeated_faults_make_it_unhealthy_until_a_step_succeeds() -> None:
    """A step has failed if a token of the base, which no request can harm, fails after it."""
    bench = Bench(max_consecutive_faults=2)
    bench.model.fail_steps = 4
    for _ in range(2):
        assert bench.engine.healthy
        bench.submit(request([1]))
        bench.engine.step()
    assert not bench.engine.healthy
    assert not bench.engine.stats().healthy
    bench.submit(request([1]))
    bench.engine.step()
    assert bench.engine.healthy


def test_logits_that_are_not_finite_fail_their_request_only() -> None:
    """LoRAX: any error of one row failed the whole mixed batch."""
    bench = Bench(FakeModel(poison=77))
    bad, good = request([1, 77], n=2), request([1, 78])
    bench.submit(bad, good)
    bench.run()
    assert isinstance(bench.error(bad), EngineFault)
    assert bench.tokens(good) == expected([1, 78])
    bench.assert_baseline()


def test_nothing_follows_the_failure_of_one_of_n_sequences() -> None:
    """The fork is a token behind: in the step where its elder fails, its own logits are fine, and must be dropped."""
    ids = expected([1, 2], count=8)
    assert ids[4] not in ids[:4]
    bench = Bench(FakeModel(poison=ids[4]))
    r = request([1, 2], n=2)
    bench.submit(r)
    bench.run()
    assert isinstance(bench.error(r), EngineFault)
    assert bench.tokens(r, 0) == ids[:5]
    assert bench.tokens(r, 1) == ids[:4]
    bench.assert_baseline()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_device_without_memory_for_a_step_fails_its_requests_only(asynchronous: bool) -> None:
    """However often it happens: the next step may be a small one, and the server is healthy."""
    bench = Bench(FakeModel(asynchronous=asynchronous, fault=torch.OutOfMemoryError("tried to allocate 2 GiB")))
    for i in range(10):
        bench.model.fail_steps = 1
        crowded = [request([i, 1], request_id="a"), request([i, 2], adapter("x"), n=2, request_id="b")]
        bench.submit(*crowded)
        bench.engine.step()
        for r in crowded:
            error = bench.error(r)
            assert isinstance(error, Overloaded)
            assert (error.status, error.reason) == ("RESOURCE_EXHAUSTED", "DEVICE_MEMORY")
            assert "GiB" not in error.message
    assert bench.engine.healthy
    assert bench.engine.stats().faults == 0
    later = request([3, 4])
    bench.submit(later)
    bench.run()
    assert bench.tokens(later) == expected(later.prompt_ids)
    bench.assert_baseline()


def test_rows_that_are_sampled_alone_have_the_memory_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the failed attempt had computed was kept while each row was tried, which then failed as well."""
    held: list[weakref.ref[Tensor]] = []

    def short(logits: Tensor, seqs: list[Sequence]) -> list[Sampled | None]:
        if not held:
            probabilities = logits.softmax(dim=1)
            held.append(weakref.ref(probabilities))
            raise torch.OutOfMemoryError("seeded")
        if held[0]() is not None:
            raise torch.OutOfMemoryError("the batch's probabilities are still there")
        return sample(logits, seqs)

    bench = Bench()
    crowd = [request([1, 2]), request([5])]
    bench.submit(*crowd)
    with monkeypatch.context() as patch:
        patch.setattr("loramux.engine.engine.sample", short)
        patch.setattr("loramux.engine.engine.log.exception", lambda *_: None)  # pytest keeps what is logged, frames too
        bench.run()
    assert [bench.tokens(r) for r in crowd] == [expected([1, 2]), expected([5])]
    bench.assert_baseline()


def test_without_memory_to_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("seeded")

    bench = Bench()
    r = request([1, 2])
    bench.submit(r)
    with monkeypatch.context() as patch:
        patch.setattr("loramux.engine.engine.sample", full)
        bench.engine.step()
    assert isinstance(bench.error(r), Overloaded)
    bench.assert_baseline()

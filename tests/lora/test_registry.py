"""The rules of names, uids, leases and bytes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from loramux.engine.request import AdapterHandle
from loramux.errors import AdapterNotFound, AdapterUnavailable, InvalidAdapter, Overloaded, SlowReader
from loramux.lora.entry import AdapterEntry, Residency, State
from loramux.lora.registry import AdapterRegistry

from tests.lora.fakes import FakeAdapter


@pytest.fixture
def registry() -> AdapterRegistry:
    return AdapterRegistry(device_budget=100, clock=lambda: 12.0)


def load(registry: AdapterRegistry, name: str = "a", nbytes: int = 10) -> AdapterEntry:
    entry = registry.begin(name, f"/{name}")
    registry.ready(entry.uid, FakeAdapter(nbytes))
    registry.check()
    return entry


BROKEN = InvalidAdapter("q_proj.lora_A.weight", "holds 1 NaN", reason="NOT_FINITE")


def test_policy_imports_no_torch() -> None:
    code = (
        "import sys, loramux.lora.manager, loramux.lora.registry, loramux.lora.roots; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_entry_is_what_requests_hold(registry: AdapterRegistry) -> None:
    entry = load(registry)
    handle: AdapterHandle = registry.lease(["a"], "r1")[0]
    assert handle.entry is entry
    assert (entry.state, entry.residency, set(entry.leases)) == (State.READY, Residency.DEVICE, {"r1"})
    assert (entry.nbytes, entry.max_rank, entry.site_count, entry.loaded_at, entry.last_used_at) == (
        10,
        8,
        1,
        12.0,
        12.0,
    )


def test_an_unknown_name_is_not_found(registry: AdapterRegistry) -> None:
    """TGI #2505: an unknown adapter was answered with the base, in silence."""
    for name in ("nope", "", "A"):
        with pytest.raises(AdapterNotFound):
            registry.lease([name], "r1")


def test_a_loading_adapter_may_be_leased_and_the_handle_becomes_ready(registry: AdapterRegistry) -> None:
    entry = registry.begin("a", "/a")
    handle = registry.lease(["a"], "r1")[0]
    assert handle.weights is None
    registry.ready(entry.uid, FakeAdapter())
    assert handle.weights is not None
    registry.check()


def test_a_failed_load_reaches_those_who_wait_and_those_who_come(registry: AdapterRegistry) -> None:
    entry = registry.begin("a", "/a")
    handle = registry.lease(["a"], "r1")[0]
    registry.fail(entry.uid, BROKEN)
    assert isinstance(handle.error, AdapterUnavailable)
    with pytest.raises(AdapterUnavailable, match=r"q_proj.lora_A.weight: holds 1 NaN") as caught:
        registry.lease(["a"], "r2")
    assert caught.value.metadata["cause"] == "NOT_FINITE"
    assert set(entry.leases) == {"r1"}
    registry.release(entry.uid, "r1")
    registry.check()
    load(registry)  # a later load takes the name over
    assert entry.state is State.UNLOADED
    assert registry.lease(["a"], "r3")[0].weights is not None


def test_a_failed_entry_keeps_no_frame_alive(registry: AdapterRegistry) -> None:
    """A traceback holds the reader's frames, and those the whole file: a failed load that keeps its memory."""
    entry = registry.begin("a", "/a")
    try:
        raise BROKEN
    except InvalidAdapter as error:
        registry.fail(entry.uid, error)
    assert entry.error is not None
    assert entry.error.__traceback__ is None
    assert entry.error.__context__ is None


def test_releasing_twice_is_harmless(registry: AdapterRegistry) -> None:
    """SGLang #25864, #34205: a usage counter drifted after aborts, so unload waited for ever."""
    entry = load(registry)
    registry.lease(["a"], "r1")
    registry.lease(["a"], "r2")
    for _ in range(3):
        registry.release(entry.uid, "r1")
    assert set(entry.leases) == {"r2"}
    registry.unload("a")
    assert entry.state is State.DRAINING
    registry.release(entry.uid, "r2")
    assert entry.state is State.UNLOADED
    registry.release(entry.uid, "r2")
    registry.release("no such uid", "r2")
    assert registry.budget.used == 0
    registry.check()


def test_one_request_that_takes_an_adapter_twice_gives_it_back_once(registry: AdapterRegistry) -> None:
    """A mix may name one adapter twice, and n > 1 sequences end one by one (SGLang #34205)."""
    entry = load(registry)
    registry.lease(["a"], "r1")
    registry.lease(["a"], "r1")
    registry.unload("a")
    registry.release(entry.uid, "r1")
    assert entry.state is State.UNLOADED


def test_draining_takes_no_new_requests_and_frees_with_the_last(registry: AdapterRegistry) -> None:
    entry = load(registry)
    registry.lease(["a"], "r1")
    registry.unload("a")
    with pytest.raises(AdapterNotFound):
        registry.lease(["a"], "r2")
    assert entry.weights is not None, "running requests keep their weights"
    assert registry.budget.used == 10
    registry.release(entry.uid, "r1")
    assert entry.weights is None
    assert registry.entries() == []


def test_replacing_is_atomic(registry: AdapterRegistry) -> None:
    old = load(registry)
    registry.lease(["a"], "old request")
    new = registry.begin("a", "/b")
    assert registry.lease(["a"], "during")[0].entry is old, "the old one serves while the new one loads"
    registry.ready(new.uid, FakeAdapter(20))
    assert registry.lease(["a"], "after")[0].entry is new
    assert old.state is State.DRAINING
    assert old.weights is not None
    assert registry.budget.used == 30
    registry.check()
    registry.release(old.uid, "old request")
    registry.release(old.uid, "during")
    assert old.state is State.UNLOADED
    assert registry.budget.used == 20
    registry.check()


def test_a_failed_replacement_changes_nothing(registry: AdapterRegistry) -> None:
    old = load(registry)
    new = registry.begin("a", "/b")
    registry.fail(new.uid, BROKEN)
    assert registry.lease(["a"], "r1")[0].entry is old
    assert registry.entries() == [old]
    registry.check()


def test_the_budget_counts_what_loads_and_what_drains(registry: AdapterRegistry) -> None:
    draining = load(registry, "a", 40)
    registry.lease(["a"], "r1")
    registry.unload("a")
    loading = registry.begin("b", "/b")
    registry.budget.reserve(loading.uid, 40, what="b")
    third = registry.begin("c", "/c")
    with pytest.raises(Overloaded) as caught:
        registry.budget.reserve(third.uid, 21, what="adapter 'c'")
    assert caught.value.reason == "ADAPTER_BUDGET_EXCEEDED"
    assert caught.value.metadata == {"needed_bytes": "21", "used_bytes": "80", "budget_bytes": "100"}
    registry.budget.reserve(third.uid, 20, what="c")
    registry.release(draining.uid, "r1")
    registry.budget.reserve(third.uid, 60, what="c")  # takes the place of the 20
    registry.check()


def test_more_bytes_than_reserved_are_checked_again(registry: AdapterRegistry) -> None:
    load(registry, "a", 90)
    registry.pin("a", True)  # or it would make room
    entry = registry.begin("b", "/b")
    registry.budget.reserve(entry.uid, 5, what="b")
    with pytest.raises(Overloaded):
        registry.ready(entry.uid, FakeAdapter(11))
    assert entry.state is State.LOADING
    assert entry.weights is None
    registry.fail(entry.uid, BROKEN)
    registry.budget.unreserve(entry.uid)
    registry.check()
    assert registry.budget.reserved == 0


def test_pin(registry: AdapterRegistry) -> None:
    entry = load(registry)
    assert registry.pin("a", True) is entry
    assert entry.pinned
    with pytest.raises(AdapterNotFound):
        registry.pin("b", True)


async def test_a_subscriber_sees_what_is_and_then_what_changes(registry: AdapterRegistry) -> None:
    a = load(registry, "a")
    subscription = registry.subscribe()
    assert await subscription.next() is a
    b = registry.begin("b", "/b")
    registry.ready(b.uid, FakeAdapter())
    registry.pin("a", True)
    assert await subscription.next() is b, "two changes of one adapter are one message with the latest state"
    assert await subscription.next() is a
    registry.unload("a")
    assert await subscription.next() is a
    assert a.state is State.UNLOADED
    subscription.close()
    load(registry, "c")
    assert await subscription.next() is None


async def test_a_subscriber_that_never_reads_is_bounded(registry: AdapterRegistry) -> None:
    """Ten thousand loads with a watcher that hangs must not take memory for each."""
    subscription = registry.subscribe(limit=5)
    for index in range(50):
        load(registry, f"a{index}", 1)
        registry.unload(f"a{index}")
    assert len(subscription._waiting) == 0
    with pytest.raises(SlowReader) as caught:
        await subscription.next()
    assert caught.value.reason == "WATCH_TOO_SLOW"
    assert registry._listeners == []

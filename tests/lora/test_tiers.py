"""Whose turn it is and what is put out for it: nothing is taken from a request, nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from loramux.errors import AdapterUnavailable, DeadlineExceeded, InvalidAdapter, Overloaded
from loramux.lora.entry import AdapterEntry, Lease, Residency, State
from loramux.lora.registry import AdapterRegistry

from tests.lora.fakes import FakeAdapter


class Store:
    """A registry whose files have `sizes`; work that the tiers ask for waits until `serve`."""

    def __init__(self, sizes: dict[str, int], device: int, host: int = 0) -> None:
        self.now = 0.0
        self.registry = AdapterRegistry(device_budget=device, host_budget=host, clock=lambda: self.now)
        self.tiers = self.registry.tiers
        self.tiers._clock = lambda: self.now
        self.tiers.measure = self.measure
        self.tiers.fetch = self.fetch
        self.sizes = sizes
        self.fetching: list[AdapterEntry] = []
        self.reads = 0
        for name in sizes:
            self.registry.register(name, f"/{name}")

    def measure(self, entry: AdapterEntry) -> None:
        self.tiers.measured(entry, self.sizes[entry.name])

    def fetch(self, entry: AdapterEntry) -> None:
        if entry.hosted is not None:
            self.registry.fetched(entry.uid, entry.hosted)
        else:
            self.fetching.append(entry)

    def serve(self) -> None:
        """All that is being read arrives."""
        while self.fetching:
            entry = self.fetching.pop(0)
            self.reads += 1
            if entry.state is not State.UNLOADED:
                self.registry.fetched(entry.uid, FakeAdapter(self.sizes[entry.name], f"sha256:{entry.name}"))
            self.registry.budget.unreserve(entry.uid)
            self.tiers.advance()
            self.registry.check()

    def ask(self, request: str, *names: str) -> list[Lease]:
        leases = self.registry.lease(names, request)
        self.registry.check()
        return leases

    def end(self, request: str, leases: list[Lease]) -> None:
        for lease in leases:
            self.registry.release(lease.uid, request)
        self.registry.check()

    def resident(self) -> set[str]:
        return {e.name for e in self.registry.entries() if e.residency is Residency.DEVICE}


def has_turn(leases: list[Lease]) -> bool:
    return all(lease.weights is not None for lease in leases)


def test_a_registered_adapter_is_read_when_it_is_first_asked_for() -> None:
    store = Store({"a": 10}, device=100)
    entry = store.registry.get("a")
    assert (entry.state, entry.digest) == (State.REGISTERED, "")
    leases = store.ask("r1", "a")
    assert not has_turn(leases)
    store.serve()
    assert has_turn(leases)
    assert (entry.state, leases[0].digest) == (State.READY, "sha256:a")
    assert has_turn(store.ask("r2", "a"))
    assert store.reads == 1


def test_what_is_put_out_is_worth_least_and_held_by_nobody() -> None:
    store = Store({"often": 40, "once": 40, "new": 40}, device=100)
    for request in range(5):
        leases = store.ask(f"r{request}", "often")
        store.serve()
        store.end(f"r{request}", leases)
    leases = store.ask("r9", "once")
    store.serve()
    store.end("r9", leases)
    assert store.resident() == {"often", "once"}
    new = store.ask("n", "new")
    store.serve()
    assert has_turn(new)
    assert store.resident() == {"often", "new"}
    assert store.tiers.evictions == 1


def test_what_a_request_holds_or_an_operator_pinned_stays() -> None:
    store = Store({"held": 50, "pinned": 50, "new": 50}, device=100)
    held = store.ask("r1", "held")
    pinned = store.ask("r2", "pinned")
    store.serve()
    store.registry.pin("pinned", True)
    store.end("r2", pinned)
    waiting = store.ask("r3", "new")
    store.serve()
    assert not has_turn(waiting)
    assert store.resident() == {"held", "pinned"}
    store.end("r1", held)
    store.serve()
    assert has_turn(waiting)
    assert store.resident() == {"pinned", "new"}


def test_two_mixes_that_need_the_same_memory_take_turns() -> None:
    """With leases taken one by one each would hold a half that the other needs."""
    store = Store({"a": 60, "b": 60, "c": 60, "d": 60}, device=120)
    first, second = store.ask("r1", "a", "b"), store.ask("r2", "c", "d")
    store.serve()
    assert has_turn(first)
    assert not any(lease.weights is not None for lease in second)
    store.end("r1", first)
    store.serve()
    assert has_turn(second)


def test_the_oldest_is_not_starved_by_requests_for_what_is_there() -> None:
    store = Store({"popular": 60, "large": 100}, device=100)
    running = store.ask("p0", "popular")
    store.serve()
    large = store.ask("old", "large")
    for i in range(1, 50):
        store.now += 0.1
        after = store.ask(f"p{i}", "popular")
        store.end(f"p{i - 1}", running)
        running = after
        store.serve()
        if has_turn(large):
            break
    assert has_turn(large), "passed by for five seconds"
    store.end("old", large)
    store.serve()
    assert has_turn(running)


def test_what_can_never_fit_is_refused_at_once_and_alone() -> None:
    store = Store({"huge": 200, "a": 10, "pinned": 95}, device=100)
    huge, good = store.ask("r1", "huge"), store.ask("r2", "a")
    store.serve()
    assert isinstance(huge[0].error, Overloaded)
    assert has_turn(good)
    store.end("r1", huge)
    store.end("r2", good)
    pinned = store.ask("r3", "pinned")
    store.serve()
    store.registry.pin("pinned", True)
    store.end("r3", pinned)
    beside = store.ask("r4", "a")
    assert isinstance(beside[0].error, Overloaded), "only pinned adapters are in the way"
    store.end("r4", beside)


def test_the_host_keeps_what_the_device_had_no_room_for() -> None:
    store = Store({"a": 60, "b": 60, "c": 60}, device=60, host=60)
    for name in ("a", "b"):
        leases = store.ask(name, name)
        store.serve()
        store.end(name, leases)
    assert store.registry.get("a").residency is Residency.HOST
    assert store.tiers.host.used == 60
    again = store.ask("again", "a")
    assert has_turn(again), "no file is read for it"
    assert store.reads == 2
    store.end("again", again)
    leases = store.ask("c", "c")
    store.serve()
    store.end("c", leases)
    assert store.tiers.host.used == 60
    for name in ("a", "b", "c"):
        store.registry.unload(name)
    assert store.tiers.host.used == store.tiers.device.used == 0


def test_a_broken_adapter_harms_those_who_ask_for_it() -> None:
    store = Store({"broken": 10, "slow": 10, "a": 10}, device=100)
    broken, slow, good = store.ask("r1", "broken"), store.ask("r2", "slow"), store.ask("r3", "a")
    for entry in store.fetching[:2]:
        error = InvalidAdapter("x", "holds 1 NaN") if entry.name == "broken" else DeadlineExceeded("slow disk")
        store.registry.fetch_failed(entry.uid, error)
        store.registry.budget.unreserve(entry.uid)
    del store.fetching[:2]
    store.serve()
    assert has_turn(good)
    assert isinstance(broken[0].error, AdapterUnavailable)
    assert isinstance(slow[0].error, DeadlineExceeded)
    with pytest.raises(AdapterUnavailable, match="NaN"):
        store.ask("r4", "broken")
    again = store.ask("r5", "slow")
    store.serve()
    assert has_turn(again), "a slow disk is no fault of the adapter"


def test_files_that_changed_are_not_served_under_the_old_digest() -> None:
    store = Store({"a": 60, "b": 60}, device=60)
    for name in ("a", "b"):
        leases = store.ask(name, name)
        store.serve()
        store.end(name, leases)
    again = store.ask("again", "a")
    entry = store.fetching.pop()
    with pytest.raises(InvalidAdapter, match="load what lies there"):
        store.registry.fetched(entry.uid, FakeAdapter(60, "sha256:other"))
    store.registry.fetch_failed(entry.uid, InvalidAdapter("a", "changed"))
    assert again[0].error is not None


NAMES = ("a", "b", "c", "d", "e")


class TiersMachine(RuleBasedStateMachine):
    """Any order of asking, ending, arriving, failing, pinning and unloading."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store({"a": 10, "b": 20, "c": 30, "d": 45, "e": 60}, device=100, host=50)
        self.open: dict[str, list[Lease]] = {}
        self.count = 0

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    def ask(self, names: list[str]) -> None:
        self.count += 1
        request = f"r{self.count}"
        if all(self.store.registry.find(name) is not None for name in names):
            try:
                self.open[request] = self.store.ask(request, *names)
            except AdapterUnavailable:
                assert any(self.store.registry.get(name).state is State.FAILED for name in names)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.open)))
        self.store.end(request, self.open.pop(request))

    @precondition(lambda self: self.store.fetching)
    @rule()
    def arrive(self) -> None:
        self.store.now += 0.5
        self.store.serve()

    @precondition(lambda self: self.store.fetching)
    @rule(broken=st.booleans())
    def fail(self, broken: bool) -> None:
        entry = self.store.fetching.pop(0)
        error = InvalidAdapter("x", "broken") if broken else DeadlineExceeded("slow")
        self.store.registry.fetch_failed(entry.uid, error)
        self.store.registry.budget.unreserve(entry.uid)
        self.store.tiers.advance()

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if self.store.registry.find(name) is not None:
            self.store.registry.pin(name, pinned)

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        if self.store.registry.find(name) is not None:
            self.store.registry.unload(name)
        else:
            self.store.registry.register(name, f"/{name}")

    @invariant()
    def holds(self) -> None:
        self.store.registry.check()
        for leases in self.open.values():
            given = [lease.weights is not None for lease in leases]
            assert all(given) or not any(given)
            if all(given):
                assert all(lease.entry.residency is Residency.DEVICE for lease in leases)

    def teardown(self) -> None:
        """Everybody is served or refused once the others end, and all memory comes back."""
        for name in NAMES:
            if self.store.registry.find(name) is not None:
                self.store.registry.pin(name, False)
        for _ in range(3 * len(self.open) + 3):
            self.store.now += 10
            self.store.tiers.advance()
            self.store.serve()
            for request, leases in tuple(self.open.items()):
                if has_turn(leases) or any(lease.error is not None for lease in leases):
                    self.store.end(request, self.open.pop(request))
        assert not self.open, "somebody waits for ever"
        for name in NAMES:
            if self.store.registry.find(name) is not None:
                self.store.registry.unload(name)
        assert self.store.registry.entries() == []
        assert self.store.tiers.device.used == self.store.tiers.device.reserved == self.store.tiers.host.used == 0
        assert self.store.tiers.waiting == 0


TiersMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_tiers_machine = TiersMachine.TestCase

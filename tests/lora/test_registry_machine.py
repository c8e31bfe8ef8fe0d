"""Any order of loads, failures, replacements, unloads, leases and releases ends where it began."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from loramux.errors import AdapterNotFound, AdapterUnavailable, InvalidAdapter, Overloaded
from loramux.lora.entry import AdapterEntry, State
from loramux.lora.registry import AdapterRegistry

from tests.lora.fakes import FakeAdapter

NAMES = st.sampled_from(["a", "b", "c"])
REQUESTS = st.sampled_from([f"r{i}" for i in range(6)])
BUDGET = 100


class RegistryMachine(RuleBasedStateMachine):
    """Beside the registry a model that is written the other way round: a list of what was leased and not given back."""

    loads = Bundle("loads")

    def __init__(self) -> None:
        super().__init__()
        self.registry = AdapterRegistry(device_budget=BUDGET, clock=lambda: 0.0)
        self.held: set[tuple[str, str]] = set()
        self.entries: list[AdapterEntry] = []
        self.drains: set[str] = set()
        self.registry.listen(self.saw)
        # What was put out for another is back as soon as somebody asks for it.
        self.registry.tiers.fetch = lambda e: self.registry.fetched(e.uid, FakeAdapter(e.size or 0))

    def saw(self, entry: AdapterEntry) -> None:
        if entry.state is State.UNLOADED:
            self.drains.add(entry.uid)
            self.held = {(uid, request) for uid, request in self.held if uid != entry.uid}

    @rule(target=loads, name=NAMES, nbytes=st.integers(1, 60))
    def begin(self, name: str, nbytes: int) -> tuple[AdapterEntry, int]:
        running = self.registry.loading(name)
        if running is not None:
            return running, nbytes
        entry = self.registry.begin(name, "/" + name)
        self.entries.append(entry)
        try:
            self.registry.budget.reserve(entry.uid, nbytes, what=name)
        except Overloaded:
            self.registry.fail(entry.uid, InvalidAdapter("x", "too large"))
        return entry, nbytes

    @rule(load=consumes(loads), extra=st.sampled_from([0, 0, 0, -1, 30]))
    def ready(self, load: tuple[AdapterEntry, int], extra: int) -> None:
        entry, nbytes = load
        if entry.state is not State.LOADING:
            return
        before = self.registry.find(entry.name)
        try:
            self.registry.ready(entry.uid, FakeAdapter(nbytes + extra))
        except Overloaded:
            self.fail(load)
            return
        assert self.registry.find(entry.name) is entry
        assert before is entry or before is None or before.state in (State.DRAINING, State.UNLOADED)

    @rule(name=NAMES, fixed=st.booleans())
    def register(self, name: str, fixed: bool) -> None:
        """A folder is found, or found again after it changed into what nobody has read."""
        if self.registry.loading(name) is not None:
            return
        before = self.registry.find(name)
        entry = self.registry.register(name, f"/{name}/{len(self.entries)}", digest="sha256:0" if fixed else "")
        self.entries.append(entry)
        assert self.registry.find(name) is entry
        assert before is None or before.state in (State.DRAINING, State.UNLOADED)

    @rule(name=NAMES, irreplaceable=st.booleans())
    def change_folder(self, name: str, irreplaceable: bool) -> None:
        """Its folder changed, or is again what it was: what serves goes on serving, with a word of it."""
        entry = self.registry.find(name)
        if entry is None:
            return
        state, weights = entry.state, entry.weights
        self.registry.mark_irreplaceable(entry, irreplaceable)
        self.registry.notice(entry, "its folder has changed" if irreplaceable else "")
        assert (entry.state, entry.weights) == (state, weights)
        assert (entry.notice in entry.warnings) is irreplaceable

    @rule(name=NAMES, other=st.booleans())
    def fail_to_read(self, name: str, other: bool) -> None:
        """What is asked for, and is not in memory, cannot be read."""
        entry = self.registry.find(name)
        if entry is None or entry.loading or entry.weights is not None:
            return
        before = entry.state
        self.registry.fetch_failed(entry.uid, Overloaded("full") if other else InvalidAdapter("x", "broken"))
        self.registry.budget.unreserve(entry.uid)
        assert entry.state is (before if other else State.FAILED)

    @rule(load=consumes(loads))
    def fail(self, load: tuple[AdapterEntry, int]) -> None:
        entry, _ = load
        if entry.state is State.LOADING:
            self.registry.fail(entry.uid, InvalidAdapter("x", "broken"))
            self.registry.budget.unreserve(entry.uid)

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        if self.registry.loading(name) is not None:
            return  # the manager aborts the load first
        try:
            entry = self.registry.unload(name)
        except AdapterNotFound:
            return
        leased = any(uid == entry.uid for uid, _ in self.held)
        assert entry.state is (State.DRAINING if leased else State.UNLOADED)

    @rule(name=NAMES, request=REQUESTS)
    def lease(self, name: str, request: str) -> None:
        try:
            entry = self.registry.lease([name], request)[0].entry
        except (AdapterNotFound, AdapterUnavailable):
            return
        assert entry.state in (State.LOADING, State.READY, State.REGISTERED)
        self.held.add((entry.uid, request))

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), request=REQUESTS, times=st.integers(1, 2))
    def release(self, data: st.DataObject, request: str, times: int) -> None:
        entry = data.draw(st.sampled_from(self.entries), label="any entry there ever was")
        for _ in range(times):
            self.registry.release(entry.uid, request)
        self.held.discard((entry.uid, request))

    @invariant()
    def holds(self) -> None:
        self.registry.check()
        live = {(e.uid, request) for e in self.registry.entries() for request in e.leases}
        assert live == self.held

    def teardown(self) -> None:
        for entry in self.entries:
            if entry.state is State.LOADING:
                self.registry.fail(entry.uid, InvalidAdapter("x", "shut down"))
            self.registry.budget.unreserve(entry.uid)
        for uid, request in tuple(self.held):
            self.registry.release(uid, request)
        for name in ("a", "b", "c"):
            if self.registry.find(name) is not None:
                self.registry.unload(name)
        assert self.registry.entries() == []
        assert self.registry.budget.used == self.registry.budget.reserved == 0
        assert all(entry.weights is None for entry in self.entries)


RegistryMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
test_registry_machine = RegistryMachine.TestCase

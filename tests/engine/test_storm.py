"""Any order of submits, aborts, loads, faults, deadlines and steps keeps the books balanced and the text right."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from loramux.engine.request import RequestFailed, SequenceFinished
from loramux.errors import AdapterUnavailable, Cancelled, DeadlineExceeded, EngineFault

from .fakes import Bench, FakeAdapter, FakeModel, adapter, expected, request

READY = (adapter("a"), adapter("b"))


class Storm(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(FakeModel(num_kv_blocks=14), max_batch_rows=3, max_batch_tokens=7)
        self.loading: list[FakeAdapter] = []
        self.serial = 0

    @rule(
        prompt=st.sampled_from([[1], [1, 2, 3, 4], list(range(9)), list(range(25)), [9] * 40]),
        who=st.sampled_from(["base", "a", "b", "mix", "loading"]),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(-2, 2),
        seconds=st.sampled_from([None, None, None, 0.0, 3.0]),
    )
    def submit(self, prompt: list[int], who: str, n: int, priority: int, seconds: float | None) -> None:
        self.serial += 1
        uses = {"base": (), "a": READY[:1], "b": READY[1:], "mix": READY}.get(who)
        if uses is None:
            self.loading.append(FakeAdapter("new", f"new-{self.serial}"))
            uses = (self.loading[-1],)
        deadline = None if seconds is None else self.bench.now + seconds
        r = request(prompt, *uses, n=n, priority=priority, deadline=deadline, arrival=self.bench.now)
        self.bench.submit(r)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.bench.now += 0.1
            self.bench.engine.step()

    @precondition(lambda self: self.bench.events)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        r = data.draw(st.sampled_from(list(self.bench.events)))
        self.bench.engine.abort(r, Cancelled("gone"))

    @precondition(lambda self: self.loading)
    @rule(fails=st.booleans())
    def finish_load(self, fails: bool) -> None:
        handle = self.loading.pop()
        if fails:
            handle.error = AdapterUnavailable("corrupt")
        else:
            handle.load()

    @rule()
    def fault(self) -> None:
        self.bench.model.fail_steps = 1

    @invariant()
    def books_balance(self) -> None:
        self.bench.engine.check_books()
        assert len(self.bench.engine.scheduler.running) <= 3

    def teardown(self) -> None:
        for handle in self.loading:
            handle.load()
        self.bench.model.fail_steps = 0
        self.bench.run()
        self.bench.assert_baseline()
        for r, events in self.bench.events.items():
            last = events[-1]
            if isinstance(last, SequenceFinished):
                for i in range(r.sampling.n):
                    assert self.bench.tokens(r, i) == expected(r.prompt_ids, r.adapters)
            else:
                assert isinstance(last, RequestFailed)
                assert isinstance(last.error, Cancelled | DeadlineExceeded | EngineFault | AdapterUnavailable)


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

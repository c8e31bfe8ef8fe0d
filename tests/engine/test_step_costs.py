"""How long a step may take while others decode. The clock is the test's own: a step takes what the test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from loramux.engine.request import Request
from loramux.engine.step_costs import LEAST_CHUNK, StepCosts
from loramux.errors import Cancelled
from loramux.model.inputs import ModelInputs
from torch import Tensor

from .fakes import Bench, FakeModel, expected, request

Cost = Callable[[int, int], float]  # tokens of a step, tokens of its longest context → seconds


class TimedModel(FakeModel):
    """Steps take time, on the bench's clock."""

    def __init__(self, cost: Cost) -> None:
        super().__init__(num_kv_blocks=600, max_context=2100)
        self.cost = cost
        self.pass_time: Callable[[float], None]
        self.seconds: list[float] = []

    def forward(self, inputs: ModelInputs) -> Tensor:
        logits = super().forward(inputs)
        self.seconds.append(self.cost(len(inputs.token_ids), int(inputs.context_lens.max())))
        self.pass_time(self.seconds[-1])
        return logits


def _bench(cost: Cost, **settings: Any) -> tuple[Bench, TimedModel]:
    model = TimedModel(cost)
    bench = Bench(model, **{"max_batch_rows": 64, "max_batch_tokens": 512, "step_target": 0.1} | settings)

    def pass_time(seconds: float) -> None:
        bench.now += seconds

    model.pass_time = pass_time
    return bench, model


def _prefill_beside(bench: Bench, model: TimedModel, streams: int = 1, tokens: int = 500) -> tuple[Request, list[int]]:
    """Streams run, then a long prompt comes: it, and the tokens of the steps until it has its first token."""
    running = [request([i + 1], max_new_tokens=800, request_id=f"stream {i}") for i in range(streams)]
    bench.submit(*running)
    for _ in range(5):
        bench.engine.step()
    model.steps.clear()
    model.seconds.clear()
    long = request([i % 256 for i in range(tokens)], max_new_tokens=1, request_id="long")
    bench.submit(long)
    while long not in bench.finished:
        bench.engine.step()
    for r in running:
        bench.engine.abort(r, Cancelled("enough"))
    return long, [tokens for _, tokens in model.steps]


COSTS: dict[str, Cost] = {
    "an old machine": lambda tokens, context: 0.015 + 0.004 * tokens,
    "a fast one": lambda tokens, context: 0.004 + 0.0008 * tokens,
    "mostly fixed": lambda tokens, context: 0.07 + 0.0005 * tokens,
    "dearer with each token before": lambda tokens, context: 0.01 + tokens * (0.001 + 1e-5 * context),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_step_takes_about_the_target_while_others_decode(name: str) -> None:
    bench, model = _bench(COSTS[name])
    long, _ = _prefill_beside(bench, model)
    assert bench.tokens(long) == expected(long.prompt_ids, count=1)
    settled = model.seconds[4:-1]  # the first steps are for learning, the last one for what is left
    assert max(model.seconds) < 0.2
    assert max(settled) < 0.15
    assert min(settled) > 0.06
    bench.assert_baseline()


def test_without_others_a_prompt_takes_all_of_a_step() -> None:
    bench, model = _bench(COSTS["an old machine"])
    bench.submit(request([7] * 1100, max_new_tokens=1))
    bench.run()
    assert [tokens for _, tokens in model.steps] == [512, 512, 76]


def test_two_prompts_without_others() -> None:
    """A prompt in the making is nobody who decodes."""
    bench, model = _bench(COSTS["an old machine"])
    bench.submit(request([7] * 700, max_new_tokens=1), request([8] * 300, max_new_tokens=1))
    bench.run()
    assert [tokens for _, tokens in model.steps] == [512, 488]


def test_a_device_that_is_fast_enough_is_not_bounded() -> None:
    bench, model = _bench(lambda tokens, context: 0.007 + 0.00002 * tokens)
    _, steps = _prefill_beside(bench, model, tokens=1200)
    assert steps.count(512) >= 1
    assert len(steps) <= 4


def test_no_target_no_bound() -> None:
    bench, model = _bench(COSTS["an old machine"], step_target=0.0)
    _, steps = _prefill_beside(bench, model)
    assert steps == [501]


def test_the_bounded_budget_is_shared_by_prompts() -> None:
    bench, model = _bench(COSTS["an old machine"])
    bench.submit(request([3] * 90, max_new_tokens=1, request_id="second", arrival=2000.0))
    _prefill_beside(bench, model, tokens=80)
    assert max(model.seconds[3:]) < 0.15


@pytest.mark.parametrize("streams", [1, 40])
def test_prefill_goes_on_where_decoding_alone_takes_longer(streams: int) -> None:
    bench, model = _bench(lambda tokens, context: 0.3 + 0.01 * tokens)
    _, steps = _prefill_beside(bench, model, streams=streams, tokens=200)
    assert set(steps[:-1]) == {streams + max(LEAST_CHUNK, streams // 2)}


def test_one_step_that_was_held_up_changes_nothing() -> None:
    costs = StepCosts()
    for _ in range(4):
        costs.note(25, 0.1)
    before = costs.chunk(1, 0.1)
    costs.note(25, 3.0)
    assert costs.chunk(1, 0.1) == before == 24


def test_two_slow_steps_are_no_accident() -> None:
    costs = StepCosts()
    for seconds in (0.1,) * 8 + (0.2,) * 2:
        costs.note(25, seconds)
    assert costs.chunk(1, 0.1) == LEAST_CHUNK


def test_a_slow_first_step_is_forgotten() -> None:
    """The first one compiles kernels, or reads the weights from disk."""
    costs = StepCosts()
    costs.note(512, 60.0)
    for _ in range(8):
        tokens = 1 + (costs.chunk(1, 0.1) or 0)
        costs.note(tokens, 0.004 + 0.0005 * tokens)
    assert (costs.chunk(1, 0.1) or 0) > 100


def test_nothing_is_known_at_first() -> None:
    assert StepCosts().chunk(1, 0.1) == LEAST_CHUNK

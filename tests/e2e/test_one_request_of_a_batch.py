"""Requests that fail inside a real model: who shares their batches, or takes their blocks later, gets the same answer.

They are put into the engine behind the checks of its limits, which refuse some of them.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from loramux.engine.engine import Engine
from loramux.engine.request import AdapterUse, Delta, Event, Request, RequestFailed, SamplingParams, SequenceFinished
from loramux.engine.settings import EngineSettings
from loramux.errors import EngineFault
from loramux.model.causal_lm import CausalLM
from loramux.model.loading import load_model
from loramux.ops.segment import LoraWeights

from tests.engine.fakes import FakeAdapter, byte_tokenizer
from tests.model.tiny import save_tiny
from tests.ops.test_native import flat

PROMPTS = [[5, 17, 99, 3, 42, 7, 64, 23, 11], [88, 2, 101, 64], [1] * 13]


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder: Path = tmp_path_factory.mktemp("tiny")
    return load_model(str(save_tiny("llama", folder)), device="cpu", dtype=request.param).model


def adapter(model: CausalLM, value: float) -> FakeAdapter:
    """All factors B are `value`, A is small."""
    factors: list[LoraWeights | None] = [
        LoraWeights(
            torch.full((4, site.in_features), 0.01, dtype=model.dtype),
            torch.full((site.out_features, 4), value, dtype=model.dtype),
        )
        for site in model.sites
    ]
    if model.dtype == torch.bfloat16:
        return FakeAdapter("a", f"a-{value}", weights=flat(factors))
    return FakeAdapter("a", f"a-{value}", weights={i: f for i, f in enumerate(factors) if f is not None})


class Run:
    def __init__(self, model: CausalLM) -> None:
        self.model = model
        model.allocate_kv(16, 4)  # so few that blocks change hands
        settings = EngineSettings(block_size=4, max_batch_rows=8, max_batch_tokens=16, max_consecutive_faults=2)
        self.engine = Engine(model, byte_tokenizer(), settings, on_finish=lambda request: None)
        self.events: dict[str, list[Event]] = {}

    def submit(self, name: str, prompt: list[int], *uses: AdapterUse, count: int = 6) -> None:
        sampling = SamplingParams(max_new_tokens=count, ignore_eos=True, logprobs=True, top_logprobs=2)
        self.events[name] = []
        self.engine.submit(Request(name, tuple(prompt), sampling, adapters=uses), self.events[name].append)

    def finish(self) -> None:
        while self.engine.step():
            self.engine.check_books()

    def answer(self, name: str) -> list[object]:
        assert isinstance(self.events[name][-1], SequenceFinished), self.events[name][-1]
        exact = self.model.backend.batch_invariant
        return [(e.token_ids, e.logprobs if exact else ()) for e in self.events[name] if isinstance(e, Delta)]


def good(run: Run, good_adapter: FakeAdapter) -> list[str]:
    uses = [(), (AdapterUse(good_adapter, 0.5),), (AdapterUse(good_adapter),)]
    for i, prompt in enumerate(PROMPTS):
        run.submit(f"good {i}", prompt, *uses[i])
    return [f"good {i}" for i in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("value", "weight"),
    [(0.01, 1e39), (0.01, -1e300), (math.inf, 1.0), (math.nan, 1.0), (1e30, 1e4), (-3e38, 1.0), (None, 1.0)],
    ids=str,
)
def test_the_others_get_the_same_answers(
    model: CausalLM, value: float | None, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is no float32; factors that are no numbers, or too large; and weights that are none at all."""
    monkeypatch.setattr("loramux.engine.group.check_mix", lambda adapters: None)  # refuses the weights once more
    fine = adapter(model, 0.05)
    alone = []
    for i in range(len(PROMPTS)):
        run = Run(model)
        names = good(run, fine)
        for name in names[:i] + names[i + 1 :]:
            run.engine.abort(next(r for r in run.engine._groups if r.request_id == name), EngineFault("not needed"))
        run.finish()
        alone.append(run.answer(names[i]))
    bad = FakeAdapter("a", "a-none", weights={0: "no factors"}) if value is None else adapter(model, value)
    run = Run(model)
    for i in range(3):
        run.submit(f"bad {i}", [7, 9, 11, 13, 15 + i], AdapterUse(bad, weight))
        names = good(run, fine)
        run.finish()
        ends = run.events[f"bad {i}"][-1]
        if isinstance(ends, RequestFailed):
            assert isinstance(ends.error, EngineFault)
        else:  # float32 takes more than bf16
            assert model.dtype == torch.float32
        assert [run.answer(name) for name in names] == alone
        assert run.engine.healthy
    assert run.engine.stats().kv_blocks_used == 0

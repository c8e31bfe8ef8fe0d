"""A failure at any place between schedule and deliver ends the request that it concerns, and no other.

`PLACES` names each place, and how a failure is seeded there for one request of several: the others' answers are those
that they get alone, the books balance, and the engine stays healthy however often it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from loramux.engine import batch, engine, group, kv_cache, sampler, sequence, stop_strings
from loramux.engine.detokenizer import TextStream
from loramux.engine.request import AdapterUse, Request
from loramux.errors import EngineFault, InvalidRequest, Overloaded
from loramux.model.inputs import ModelInputs
from torch import Tensor

from .fakes import Bench, FakeModel, adapter, expected, request

POISON = "poison"
WEIGHT = 0.625  # of the poisoned request's adapter, and of no other's


class Panic(BaseException):
    """What PyO3 raises when Rust code panics: no Exception."""


class Trap:
    """Fails what it is set into when that concerns the poisoned request, once it is armed."""

    def __init__(self, patch: pytest.MonkeyPatch, fault: BaseException | None = None) -> None:
        self.patch = patch
        self.armed = False
        self.sprung = 0
        self.fault = fault or RuntimeError("seeded fault: a secret of the internals")

    def set(self, owner: Any, name: str, concerns: Callable[..., bool]) -> None:
        """`concerns` is asked with the arguments of `owner.name`."""
        plain = getattr(owner, name)

        def trapped(*args: Any, **kwargs: Any) -> Any:
            if self.armed and concerns(*args, **kwargs):
                self.sprung += 1
                raise self.fault
            return plain(*args, **kwargs)

        self.patch.setattr(owner, name, trapped)


def _ours(item: Any) -> bool:
    """Whether a request, group, sequence, row or list of them is poisoned or has it among them."""
    if isinstance(item, list):
        return any(map(_ours, item))
    if isinstance(item, Request):
        return item.request_id == POISON
    for name in ("sequence", "group", "request"):
        if hasattr(item, name):
            return _ours(getattr(item, name))
    return False


def _weighted(_: Any, inputs: ModelInputs) -> bool:
    return any(segment.weight == WEIGHT for segment in inputs.segments)


def _held_as(attribute: str) -> Callable[..., bool]:
    """For objects that know of no request: whether a poisoned sequence holds it."""

    def concerns(item: object, *_: Any, **__: Any) -> bool:
        return any(getattr(seq, attribute) is item for g in _groups if _ours(g) for seq in g.sequences)

    return concerns


_groups: list[Any] = []

PLACES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "a look at the adapters": (group.Group, "observe", lambda g, now: _ours(g)),
    "whether it may start": (group.Group, "may_start", lambda g, seq: _ours(g)),
    "the prefix cache": (kv_cache.KVCache, "_cached_prefix", lambda kv, seq: _ours(seq)),
    "admission": (kv_cache.KVCache, "admit", lambda kv, seq, headroom: _ours(seq)),
    "blocks": (kv_cache.KVCache, "reserve", lambda kv, seq: _ours(seq)),
    "token ids": (batch, "_token_ids", _ours),
    "block tables": (batch, "_block_tables", _ours),
    "segments": (batch, "_segments", lambda rows, starts: _ours(rows)),
    "the model": (FakeModel, "forward", _weighted),
    "penalties": (sampler, "apply_row_rules", lambda row, seq: _ours(seq)),
    "the draw": (sampler, "_draw", lambda logits, seq: _ours(seq)),
    "log probabilities": (sampler, "_add_logprobs", lambda results, raw, seqs: _ours(seqs)),
    "prefix keys": (kv_cache.KVCache, "commit", lambda kv, seq: _ours(seq)),
    "the sequence": (sequence.Sequence, "accept", lambda seq, token: _ours(seq)),
    "text": (TextStream, "push", _held_as("text")),
    "stop strings": (stop_strings.StopScanner, "feed", _held_as("scanner")),
    "a token's text": (engine.Engine, "_logprobs", lambda self, token: token.logprob is not None),
    "usage": (group.Group, "usage", _ours),
    "timings": (group.Group, "timings", lambda group, now: _ours(group)),
}


@pytest.fixture(autouse=True)
def _know_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    _groups.clear()
    plain = engine.make_group
    monkeypatch.setattr(engine, "make_group", lambda *a, **k: (_groups.append(made := plain(*a, **k)), made)[1])


def _poisoned(n: int = 1) -> Request:
    """Everything that may go wrong is asked for."""
    return request(
        [1, 2, 3, 4, 5, 6, 7],
        AdapterUse(adapter("bad"), WEIGHT),
        request_id=POISON,
        n=n,
        temperature=1.0,
        seed=1,
        frequency_penalty=0.5,
        logprobs=True,
        stop=("never ever",),
    )


def _others() -> list[Request]:
    """On the base, on an adapter, in a mix, sampled, penalized, forked; a prompt that takes several steps."""
    return [
        request([1, 2, 3, 4, 5, 6, 7], request_id="base"),
        request([2], adapter("a"), request_id="adapter", n=2),
        request([3], AdapterUse(adapter("a"), 0.5), AdapterUse(adapter("b"), 2.0), request_id="mix"),
        request([4], request_id="drawn", temperature=1.0, seed=5, top_p=0.9, presence_penalty=1.0, stop=("zz",)),
        request(range(60), adapter("b"), request_id="long", max_new_tokens=4),
    ]


def _answers(bench: Bench, r: Request) -> list[tuple[list[int], str]]:
    return [(bench.tokens(r, i), bench.text(r, i)) for i in range(r.sampling.n)]


@cache
def _alone() -> list[list[tuple[list[int], str]]]:
    """The answers of `_others`, each in an engine of its own."""
    answers = []
    for r in _others():
        bench = Bench()
        bench.submit(r)
        bench.run()
        answers.append(_answers(bench, r))
    return answers


@pytest.mark.parametrize(
    ("steps", "n", "asynchronous"), [(0, 1, False), (4, 3, True)], ids=["at once", "while it decodes"]
)
@pytest.mark.parametrize("place", PLACES)
def test_only_the_request_that_fails_ends(
    place: str, steps: int, n: int, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = _alone()
    trap = Trap(monkeypatch)
    trap.set(*PLACES[place])
    bench = Bench(FakeModel(asynchronous=asynchronous), max_batch_rows=16, max_batch_tokens=40)
    others, bad = _others(), _poisoned(n)
    bench.submit(*others[:2], bad, *others[2:])
    for _ in range(steps):
        bench.engine.step()
    trap.armed = True
    bench.run()
    trap.armed = False
    if trap.sprung:
        error = bench.error(bad)
        assert isinstance(error, EngineFault)
        assert "secret" not in error.message
    else:  # it is past this place
        assert steps
        assert bench.end(bad)
    for other, answer in zip(others, alone, strict=True):
        assert bench.end(other)
        assert _answers(bench, other) == answer, other.request_id
    assert bench.engine.healthy
    bench.assert_baseline()


@pytest.mark.parametrize("place", PLACES)
def test_it_stays_healthy_however_often(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone in its step, too: health tells of the engine, not of what is sent to it."""
    trap = Trap(monkeypatch)
    trap.set(*PLACES[place])
    trap.armed = True
    bench = Bench(max_consecutive_faults=3)
    for _ in range(5):
        bad = _poisoned()
        bench.submit(bad)
        bench.run()
        assert isinstance(bench.error(bad), EngineFault)
        assert bench.engine.healthy
    assert bench.engine.stats().faults == 5
    good = request([9])
    bench.submit(good)
    bench.run()
    assert bench.tokens(good) == expected([9])
    bench.assert_baseline()


def test_every_place_is_reached_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the table above holds nothing."""
    for place in PLACES:
        with monkeypatch.context() as patch:
            trap = Trap(patch)
            trap.set(*PLACES[place])
            trap.armed = True
            bench = Bench()
            bench.submit(_poisoned())
            bench.run()
            assert trap.sprung, place


def test_several_culprits_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trap = Trap(monkeypatch)
    trap.set(*PLACES["the model"])
    trap.armed = True
    bench = Bench(max_batch_rows=16, max_batch_tokens=64)
    bad = [_poisoned() for _ in range(4)]
    good = [request([i], request_id=str(i)) for i in range(5)]
    bench.submit(bad[0], good[0], bad[1], bad[2], *good[1:], bad[3])
    bench.run()
    assert all(isinstance(bench.error(r), EngineFault) for r in bad)
    assert [bench.tokens(r) for r in good] == [expected(r.prompt_ids) for r in good]
    bench.assert_baseline()


def test_a_panic_of_rust_code_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    trap = Trap(monkeypatch, Panic("index out of bounds"))
    trap.set(*PLACES["text"])
    trap.armed = True
    bench = Bench()
    bad, good = _poisoned(), request([8])
    bench.submit(bad, good)
    bench.run()
    assert isinstance(bench.error(bad), EngineFault)
    assert bench.tokens(good) == expected([8])
    bench.assert_baseline()


def test_a_reader_that_raises_harms_nobody_else() -> None:
    bench = Bench()
    bad, good = request([1], request_id=POISON), request([2])

    def sink(event: object) -> None:
        raise RuntimeError("a defect of a reader")

    bench.engine.submit(bad, sink)
    bench.submit(good)
    bench.run()
    assert bench.tokens(good) == expected([2])
    assert sorted(map(id, bench.finished)) == sorted(map(id, [bad, good]))
    assert bench.engine.healthy
    assert bench.engine.stats().kv_blocks_used == 0


def test_an_error_that_is_meant_for_the_caller_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is no fault of the engine."""
    refused = InvalidRequest("sampling", "seeded")
    trap = Trap(monkeypatch, refused)
    trap.set(*PLACES["penalties"])
    trap.armed = True
    bench = Bench()
    bad, good = _poisoned(), request([8])
    bench.submit(bad, good)
    bench.run()
    assert bench.error(bad) is refused
    assert bench.tokens(good) == expected([8])
    assert bench.engine.stats().faults == 0


@pytest.mark.parametrize(
    "fault", [torch.OutOfMemoryError("seeded"), torch.AcceleratorError("CUDA error: out of memory")]
)
def test_what_has_no_memory_is_not_tried_again(fault: Exception) -> None:
    """Memory that is short now is for the next step to ask."""
    bench = Bench(FakeModel(fail_steps=1, fault=fault))
    calls = []
    plain = bench.model.forward

    def forward(inputs: ModelInputs) -> Tensor:
        calls.append(inputs.context_lens.shape[0])
        return plain(inputs)

    bench.model.forward = forward  # type: ignore[method-assign]
    crowd = [request([i], request_id=str(i)) for i in range(4)]
    bench.submit(*crowd)
    bench.engine.step()
    assert {type(bench.error(r)) for r in crowd} == {Overloaded}
    assert calls in ([4], [4, 1]), "the step, and perhaps a token of the base"
    bench.assert_baseline()


def test_halves_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One culprit among N costs 2 log2 N steps, not N."""
    trap = Trap(monkeypatch)
    trap.set(*PLACES["the model"])
    trap.armed = True
    bench = Bench(max_batch_rows=16)
    bench.submit(*(request([i], request_id=str(i)) for i in range(15)), _poisoned())
    bench.engine.step()
    assert trap.sprung == 5  # 16, 8, 4, 2 and 1 of them
    assert len(bench.model.steps) == 4  # the other halves

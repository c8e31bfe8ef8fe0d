"""Every limit, once inside and once outside."""

from __future__ import annotations

from typing import Any

import pytest
from loramux.engine.door import Limits, check_request
from loramux.engine.request import AdapterUse, SamplingParams
from loramux.engine.settings import EngineSettings
from loramux.errors import InvalidRequest

from tests.engine.fakes import FakeAdapter, adapter

NAN, INF = float("nan"), float("inf")
LIMITS = Limits(vocab_size=100, max_context=32, settings=EngineSettings())

BAD_SAMPLING: list[tuple[str, dict[str, Any]]] = [
    ("sampling.n", {"n": 0}),
    ("sampling.n", {"n": 17}),
    ("sampling.n", {"n": 2**32 - 1}),  # CVE-2026-34756
    ("sampling.max_new_tokens", {"max_new_tokens": 0}),
    ("sampling.min_new_tokens", {"min_new_tokens": 9, "max_new_tokens": 8}),
    ("sampling.min_new_tokens", {"min_new_tokens": -1}),
    ("sampling.temperature", {"temperature": -0.1}),
    ("sampling.temperature", {"temperature": NAN}),
    ("sampling.temperature", {"temperature": INF}),
    ("sampling.temperature", {"temperature": 1e308}),  # finite, and no float32
    ("sampling.top_k", {"top_k": -1}),
    ("sampling.top_p", {"top_p": 0.0}),
    ("sampling.top_p", {"top_p": 1.1}),
    ("sampling.top_p", {"top_p": NAN}),
    ("sampling.min_p", {"min_p": -0.1}),
    ("sampling.min_p", {"min_p": 1.1}),
    ("sampling.min_p", {"min_p": NAN}),
    ("sampling.seed", {"seed": -1}),
    ("sampling.seed", {"seed": 2**64}),
    ("sampling.repetition_penalty", {"repetition_penalty": 0.0}),
    ("sampling.repetition_penalty", {"repetition_penalty": 10.5}),
    ("sampling.repetition_penalty", {"repetition_penalty": 1e-38}),  # logits divided by it are infinite
    ("sampling.repetition_penalty", {"repetition_penalty": 5e-324}),
    ("sampling.repetition_penalty", {"repetition_penalty": NAN}),
    ("sampling.frequency_penalty", {"frequency_penalty": 2.1}),
    ("sampling.frequency_penalty", {"frequency_penalty": NAN}),
    ("sampling.presence_penalty", {"presence_penalty": -2.1}),
    ("sampling.presence_penalty", {"presence_penalty": INF}),
    ("sampling.top_logprobs", {"top_logprobs": 21}),  # CVE-2026-116173
    ("sampling.top_logprobs", {"top_logprobs": -1}),
    ("sampling.logit_bias", {"logit_bias": {100: 1.0}}),
    ("sampling.logit_bias", {"logit_bias": dict.fromkeys(range(1025), 1.0)}),
    ("sampling.logit_bias[5]", {"logit_bias": {5: NAN}}),
    ("sampling.logit_bias[5]", {"logit_bias": {5: 100.5}}),
    ("sampling.logit_bias[5]", {"logit_bias": {5: -1e39}}),
    ("sampling.stop", {"stop": ("x",) * 17}),
    ("sampling.stop[1]", {"stop": ("x", "")}),
    ("sampling.stop[0]", {"stop": ("x" * 257,)}),
    ("sampling.stop_token_ids", {"stop_token_ids": frozenset({100})}),
    ("sampling.stop_token_ids", {"stop_token_ids": frozenset(range(65))}),
]

BAD_REQUEST: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt_ids": ()}),
    ("prompt", {"prompt_ids": (1,) * 32}),
    ("prompt", {"prompt_ids": (1, 100)}),
    ("prompt", {"prompt_ids": (1, -1)}),
    ("request_id", {"request_id": "x" * 129}),
    ("cache_salt", {"cache_salt": "x" * 257}),
    ("priority", {"priority": 101}),
    ("priority", {"priority": -101}),
    ("mix", {"adapters": (AdapterUse(FakeAdapter("a", "a-1")),) * 9}),
    *(
        ("mix[1].weight", {"adapters": (AdapterUse(adapter("a")), AdapterUse(adapter("b"), weight))})
        for weight in (1e39, -1e300, 3.5e38, 65536.0, 10_000.1, INF, -INF, NAN)
    ),
]


def _check(sampling: SamplingParams, *, prompt_ids: tuple[int, ...] = (1, 2, 3), **more: Any) -> None:
    check_request(sampling, prompt_ids, LIMITS, **more)


@pytest.mark.parametrize(("field", "knobs"), BAD_SAMPLING)
def test_bad_sampling_is_refused_by_field(field: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _check(SamplingParams(**knobs))
    assert caught.value.field == field
    assert {"limit", "given"} <= caught.value.metadata.keys()
    assert caught.value.metadata["given"] in caught.value.message


@pytest.mark.parametrize(("field", "knobs"), BAD_REQUEST)
def test_bad_request_is_refused_by_field(field: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _check(SamplingParams(), **knobs)
    assert caught.value.field == field
    assert {"limit", "given"} <= caught.value.metadata.keys()
    assert caught.value.metadata["given"] in caught.value.message


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"n": 16, "max_new_tokens": 1, "top_k": 2**32 - 1, "top_p": 1.0, "min_p": 1.0, "seed": 2**64 - 1},
        {"max_new_tokens": 2**32 - 1, "min_new_tokens": 2**32 - 1},  # bounded by the context, not refused
        {"repetition_penalty": 10.0, "frequency_penalty": -2.0, "presence_penalty": 2.0, "top_logprobs": 20},
        {"logit_bias": {99: 100.0, 0: -100.0}, "stop": ("x" * 256,) * 16, "temperature": 3.4e38},
        {"temperature": 5e-324, "min_p": 5e-324, "top_p": 5e-324, "repetition_penalty": 2.0**-20},
        {"stop_token_ids": frozenset(range(64)), "top_p": 1e-9},
    ],
)
def test_the_limits_themselves_are_allowed(knobs: dict[str, Any]) -> None:
    _check(
        SamplingParams(**knobs),
        prompt_ids=(99,) * 31,
        request_id="x" * 128,
        cache_salt="x" * 256,
        priority=-100,
        adapters=tuple(AdapterUse(adapter("a"), w) for w in (-0.5, 0.0, 5e-324, 1e-45, 1e-39, 1e4, -1e4, 1.0)),
    )


DORA = FakeAdapter("dora", "dora-1", mixable=False)


@pytest.mark.parametrize(
    ("adapters", "field"),
    [
        ((AdapterUse(adapter("a")), AdapterUse(DORA)), "mix[1].adapter"),
        ((AdapterUse(DORA, 0.5), AdapterUse(adapter("a"), 0.0)), "mix[0].adapter"),
        ((AdapterUse(DORA, 0.5),), "mix[0].adapter"),
    ],
)
def test_dora_cannot_be_mixed(adapters: tuple[AdapterUse, ...], field: str) -> None:
    """It scales the base's outputs: what it does cannot be weighted or added to what others do."""
    with pytest.raises(InvalidRequest, match=r"'dora' is a DoRA adapter.*ask for it alone, with weight 1") as caught:
        _check(SamplingParams(), adapters=adapters)
    assert (caught.value.field, caught.value.reason) == (field, "ADAPTER_NOT_MIXABLE")


def test_dora_alone_is_allowed() -> None:
    _check(SamplingParams(), adapters=(AdapterUse(DORA),))


def test_the_field_of_token_ids_can_be_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        _check(SamplingParams(), prompt_ids=(100,), prompt_field="token_ids")
    assert caught.value.field == "token_ids"
    assert caught.value.reason == "TOKEN_ID_OUT_OF_RANGE"

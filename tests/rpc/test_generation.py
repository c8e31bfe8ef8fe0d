"""The road of a good request, over real gRPC, through the real engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from loramux.answers import Delta, Finished, Started

from tests.engine.fakes import expected
from tests.rpc.stack import running

GREEDY: Any = {"max_new_tokens": 8, "ignore_eos": True}


async def test_unary_answer_is_the_models(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        result = await r.client.generate("hello", request_id="mine", **GREEDY)
        want = expected(list(b"hello"))
        assert list(result.completions[0].token_ids) == want
        assert result.text == bytes(i for i in want if i < 256).decode("utf-8", "replace")
        assert result.completions[0].finish_reason == "length"
        assert (result.request_id, result.adapters) == ("mine", ())
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (5, 8)
        assert result.timings.first_token > 0


async def test_stream_is_started_deltas_finished_and_adds_up_to_the_unary_answer(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",)) as r:
        events = [event async for event in r.client.stream("hello", adapter="a", n=2, temperature=1, seed=5, **GREEDY)]
        first, *middle, last = events
        assert isinstance(first, Started)
        assert (first.prompt_tokens, [a.name for a in first.adapters]) == (5, ["a"])
        assert first.adapters[0].uid == r.registry.get("a").uid
        assert first.adapters[0].digest == r.registry.get("a").digest
        assert isinstance(last, Finished)
        assert last.usage.completion_tokens == 16
        assert not any(isinstance(event, Started) for event in middle)
        unary = await r.client.generate("hello", adapter="a", n=2, temperature=1, seed=5, **GREEDY)
        for completion in unary.completions:
            deltas = [e for e in events if isinstance(e, Delta) and e.index == completion.index]
            assert "".join(e.text for e in deltas) == completion.text
            assert tuple(i for e in deltas for i in e.token_ids) == completion.token_ids
        assert unary.completions[0].token_ids != unary.completions[1].token_ids


async def test_inputs_give_the_ids_they_should(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        by_text = await r.client.generate("<user>hi", **GREEDY)
        by_ids = await r.client.generate(token_ids=list(b"<user>hi"), **GREEDY)
        by_chat = await r.client.generate(messages=[{"role": "user", "content": "hi"}], **GREEDY)
        assert by_text.completions == by_ids.completions == by_chat.completions
        assert await r.client.count_tokens("héllo") == 6
        assert await r.client.tokenize("hi") == [104, 105]
        assert await r.client.count_tokens(messages=[{"role": "user", "content": "hi"}]) == 8


async def test_mix_resolves_every_adapter_with_its_weight(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a", "b")) as r:
        result = await r.client.generate("hello", mix={"a": 0.25, "b": -2}, **GREEDY)
        assert [(a.name, a.weight) for a in result.adapters] == [("a", 0.25), ("b", -2.0)]
        await r.settle()


async def test_logprobs_come_one_a_token(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        result = await r.client.generate("hello", top_logprobs=3, **GREEDY)
        completion = result.completions[0]
        assert [item.token_id for item in completion.logprobs] == list(completion.token_ids)
        assert all(len(item.top) == 3 and item.top[0].logprob == item.logprob for item in completion.logprobs)
        plain = await r.client.generate("hello", **GREEDY)
        assert plain.completions[0].logprobs == ()


async def test_one_request_id_may_be_used_twice_at_once(tmp_path: Path) -> None:
    """A server that keys its state by the caller's id mixes two live requests up, or frees one's lease twice."""
    async with running(tmp_path, adapters=("a",)) as r:
        prompts = ["one", "two", "three"]
        results = await asyncio.gather(
            *(r.client.generate(p, adapter="a", request_id="same", **GREEDY) for p in prompts)
        )
        alone = [await r.client.generate(p, adapter="a", **GREEDY) for p in prompts]
        assert [x.completions for x in results] == [x.completions for x in alone]
        assert {x.request_id for x in results} == {"same"}
        await r.settle()


async def test_a_request_id_is_made_where_none_is_given(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        ids = {(await r.client.generate("x", **GREEDY)).request_id for _ in range(2)}
        assert len(ids) == 2
        assert all(ids)


async def test_get_model_tells_the_limits(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        model = await r.client.model()
        assert (model.model, model.architecture, model.device) == ("fake", "FakeForCausalLM", "cpu")
        assert (model.vocab_size, model.max_context) == (260, 256)
        assert (model.max_n, model.max_stop_strings, model.max_top_logprobs, model.max_mix) == (16, 16, 20, 8)
        assert model.max_chat_turns == 256  # of 1024: each takes a token of the context at least
        assert model.bits_per_weight == pytest.approx(4.127)
        assert model.target_modules == ("q_proj", "v_proj")


async def test_a_replaced_adapter_serves_its_stream_to_the_end(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",)) as r:
        old = r.registry.get("a")
        stream = r.client.stream("hello", adapter="a", max_new_tokens=100, ignore_eos=True)
        started = await anext(stream)
        (r.roots / "a" / "adapter_model.safetensors").write_bytes(b"other weights")
        new = await r.admin.load("a", replace=True)
        assert isinstance(started, Started)
        assert started.adapters[0].uid == old.uid != new.uid
        events = [event async for event in stream]
        assert isinstance(events[-1], Finished)
        assert (await r.client.generate("hello", adapter="a", **GREEDY)).adapters[0].uid == new.uid
        await r.settle()

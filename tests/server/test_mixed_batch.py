"""Many adapters in one batch answer as each does alone; adapters come and go while it serves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from loramux.errors import AdapterNotFound, InvalidRequest
from loramux.lora.limits import ReadLimits
from loramux.lora.snapshot import measure

from tests.server.stack import Stack, save_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")
NAMES = ["", "a0", "a1", "a2", "a3", "a4"]
PROMPTS = ["Hello", "The sea is", "1, 2, 3,", "Once upon a time there was a server that mixed nothing up"]


async def test_a_mixed_batch_answers_as_each_request_alone(stack: Stack) -> None:
    cases = [(name, prompt) for name in NAMES for prompt in PROMPTS]
    alone = [(await stack.client.generate(p, adapter=a, max_new_tokens=24, logprobs=True)) for a, p in cases]
    together = await asyncio.gather(
        *(stack.client.generate(p, adapter=a, max_new_tokens=24, logprobs=True) for a, p in cases)
    )
    assert [r.completions[0].token_ids for r in together] == [r.completions[0].token_ids for r in alone]
    assert len({r.completions[0].token_ids for r in alone if r.usage.prompt_tokens == 5}) == len(NAMES)
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.completions[0].logprobs, other.completions[0].logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


async def test_streams_add_up_to_the_unary_text(stack: Stack) -> None:
    unary = await stack.client.generate("Hello", adapter="a2", max_new_tokens=40)
    streamed = "".join([e.text async for e in stack.client.stream("Hello", adapter="a2", max_new_tokens=40)])
    assert streamed == unary.text


async def test_the_same_seed_gives_the_same_text_whatever_the_batch(stack: Stack) -> None:
    async def one(adapter: str, seed: int) -> tuple[int, ...]:
        given = {"adapter": adapter, "seed": seed, "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 24}
        result = await stack.client.generate("The sea", **given)  # type: ignore[arg-type]
        return result.completions[0].token_ids

    alone = [await one("a1", 7), await one("", 7), await one("a1", 8)]
    assert len(set(alone)) == 3
    await asyncio.gather(*(one(name, 99) for name in NAMES))
    together = await asyncio.gather(one("a1", 7), one("", 7), one("a1", 8), *(one(n, 5) for n in NAMES))
    assert together[:3] == alone


async def test_a_replacement_is_atomic(stack: Stack, folders: tuple[Path, Path]) -> None:
    """Requests that have started finish on the weights they began with; no answer mixes two versions."""
    root = folders[1]
    save_adapter(root / "old", rank=8, seed=100)
    save_adapter(root / "new", rank=16, seed=200)
    await stack.admin.load("swap", "old")
    ask = {"adapter": "swap", "max_new_tokens": 60, "ignore_eos": True}
    old = (await stack.client.generate("Hello", **ask)).text  # type: ignore[arg-type]
    baseline = stack.counts()
    running = [asyncio.create_task(stack.client.generate("Hello", **ask)) for _ in range(4)]  # type: ignore[arg-type]
    while stack.application.engine.stats().running < 4:
        await asyncio.sleep(0.005)
    replaced = await stack.admin.load("swap", "new", replace=True)
    new = await stack.client.generate("Hello", **ask)  # type: ignore[arg-type]
    assert new.text != old
    assert new.adapters[0].uid == replaced.uid
    results = await asyncio.gather(*running)
    for result in results:
        assert result.text == (old if result.adapters[0].uid != replaced.uid else new.text)
    assert any(r.adapters[0].uid != replaced.uid for r in results), "the swap came too late to prove anything"
    await stack.admin.unload("swap")
    with pytest.raises(AdapterNotFound):
        await stack.client.generate("Hello", adapter="swap")
    assert stack.counts()["adapter_bytes"] < baseline["adapter_bytes"]


async def test_a_new_load_of_a_name_never_meets_the_old_ones_prefix_cache(
    stack: Stack, folders: tuple[Path, Path]
) -> None:
    """vLLM served another adapter's keys and values after a reload (#42125, #30931)."""
    root = folders[1]
    save_adapter(root / "first", rank=8, seed=300)
    save_adapter(root / "second", rank=8, seed=400)
    prompt = "a prompt long enough to fill several blocks of the prefix cache " * 2

    async def answer(adapter: str) -> tuple[int, ...]:
        result = await stack.client.generate(prompt, adapter=adapter, max_new_tokens=16)
        return result.completions[0].token_ids

    await stack.admin.load("cached", "first")
    first = await answer("cached")
    assert await answer("cached") == first
    again = await stack.client.generate(prompt, adapter="cached", max_new_tokens=16)
    assert again.usage.cached_prompt_tokens > 0, "the prefix cache must be at work for this test to mean anything"
    await stack.admin.load("cached", "second", replace=True)
    await stack.admin.load("fresh", "second")
    assert await answer("cached") == await answer("fresh") != first
    await stack.admin.unload("cached")
    await stack.admin.unload("fresh")


async def test_n_sequences_are_n_and_are_cleaned_up(stack: Stack) -> None:
    baseline = stack.counts()
    result = await stack.client.generate("Hello", adapter="a1", n=5, temperature=1.0, seed=3, max_new_tokens=12)
    assert [c.index for c in result.completions] == [0, 1, 2, 3, 4]
    assert len({c.token_ids for c in result.completions}) > 1
    await stack.settle(baseline)


async def test_dora_and_qalora_beside_others(stack: Stack, folders: tuple[Path, Path]) -> None:
    root = folders[1]
    save_adapter(root / "dora", rank=5, seed=500, use_dora=True)
    save_adapter(root / "undora", rank=5, seed=500)
    save_adapter(root / "qalora", rank=6, seed=600, use_qalora=True, qalora_group_size=8)
    names = ["", "a1", "dora", "undora", "qalora", "a4"]
    for name in ("dora", "undora", "qalora"):
        loaded = await stack.admin.load(name, name)
        assert loaded.device_bytes == measure(root / name, stack.application.loaded.model.dtype.itemsize, ReadLimits())

    async def answer(name: str = "", mix: dict[str, float] | None = None) -> tuple[int, ...]:
        result = await stack.client.generate("Hello", adapter=name, mix=mix, max_new_tokens=24)
        return result.completions[0].token_ids

    alone = [await answer(name) for name in names]
    assert len(set(alone)) == len(names)
    assert await asyncio.gather(*map(answer, names)) == alone
    for mix in ({"a1": 0.5, "dora": 1.0}, {"dora": 0.5}):
        with pytest.raises(InvalidRequest, match="'dora' is a DoRA adapter"):
            await answer(mix=mix)
    assert await answer(mix={"dora": 1.0}) == alone[2]
    assert await answer(mix={"a1": 0.5, "qalora": 0.5}) not in alone
    for name in ("dora", "undora", "qalora"):
        await stack.admin.unload(name)


async def test_a_mix_is_the_sum_of_its_parts(stack: Stack) -> None:
    """Weight 1 on one adapter and 0 on another is that adapter; both together are neither."""
    alone = await stack.client.generate("Hello", adapter="a1", max_new_tokens=16)
    mixed = await stack.client.generate("Hello", mix={"a1": 1.0, "a3": 0.0}, max_new_tokens=16)
    both = await stack.client.generate("Hello", mix={"a1": 1.0, "a3": 1.0}, max_new_tokens=16)
    assert mixed.text == alone.text
    assert both.text != alone.text
    assert [a.weight for a in both.adapters] == [1.0, 1.0]

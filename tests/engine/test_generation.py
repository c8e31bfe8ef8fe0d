"""The text of a request does not depend on what else happens: batch, chunks, preemption, prefix cache."""

from __future__ import annotations

from typing import Any

import pytest
from loramux.engine.request import AdapterUse, Delta, FinishReason, Request, SequenceFinished

from .fakes import EOS, VOCAB, Bench, FakeModel, adapter, expected, request

A, B = adapter("a"), adapter("b")


def _mixed_requests() -> list[Request]:
    mix = (AdapterUse(A, 0.5), AdapterUse(B, -2.0))
    return [
        request([7, 8, 9]),
        request(range(1, 60), A),
        request([7, 8, 9], B),
        request([5], *mix),
        request(range(1, 60), B),
        request(range(30)),
        request([7, 8, 9], A),
    ]


@pytest.mark.parametrize("max_batch_tokens", [8, 9, 16, 33, 512])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_mixed_batch_equals_oracle_for_any_chunk_size(max_batch_tokens: int, prefix_caching: bool) -> None:
    bench = Bench(max_batch_tokens=max_batch_tokens, prefix_caching=prefix_caching)
    requests = _mixed_requests()
    bench.submit(*requests)
    bench.run()
    for r in requests:
        assert bench.tokens(r) == expected(r.prompt_ids, r.adapters)
        assert bench.end(r).reason is FinishReason.LENGTH
    assert max(tokens for _, tokens in bench.model.steps) <= max_batch_tokens
    assert max(rows for rows, _ in bench.model.steps) > 1, "nothing was batched"
    bench.assert_baseline()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_does_not_change_text(prefix_caching: bool) -> None:
    """24 blocks for six sequences that want eleven each: recomputation must give the same text, and must end."""
    bench = Bench(FakeModel(num_kv_blocks=24), prefix_caching=prefix_caching)
    requests = [request(range(i, i + 10), A, max_new_tokens=32, arrival=1.0 + i) for i in range(6)]
    bench.submit(*requests)
    bench.run()
    assert bench.engine.stats().preemptions > 0
    for r in requests:
        assert bench.tokens(r) == expected(r.prompt_ids, r.adapters, 32)
    bench.assert_baseline()


def test_one_request_may_fill_the_whole_cache() -> None:
    """What the door lets in can run: prompt and output take every block there is, beside others that must yield."""
    bench = Bench(FakeModel(num_kv_blocks=8, block_size=4))
    large = request(range(20), max_new_tokens=500)
    small = [request([i], max_new_tokens=20) for i in range(3)]
    bench.submit(large, *small)
    bench.run()
    assert bench.tokens(large) == expected(large.prompt_ids, count=12)
    assert bench.end(large).reason is FinishReason.LENGTH
    for r in small:
        assert bench.tokens(r) == expected(r.prompt_ids, count=20)
    bench.assert_baseline()


def test_prefix_cache_hit_gives_the_same_text() -> None:
    bench = Bench()
    first, second = request(range(40), A), request(range(40), A)
    bench.submit(first)
    bench.run()
    bench.submit(second)
    bench.run()
    assert bench.end(first).usage.cached_prompt_tokens == 0
    assert bench.end(second).usage.cached_prompt_tokens == 36  # never the last prompt token: its logits are needed
    assert bench.tokens(second) == bench.tokens(first) == expected(first.prompt_ids, first.adapters)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(request(range(40)), id="base"),
        pytest.param(request(range(40), B), id="other adapter"),
        pytest.param(request(range(40), adapter("a", "a-2")), id="same name, reloaded"),
        pytest.param(request(range(40), AdapterUse(A, 0.5)), id="other weight"),
        pytest.param(request(range(40), A, B), id="mix"),
        pytest.param(request(range(40), A, cache_salt="tenant"), id="other salt"),
    ],
)
def test_prefix_cache_never_serves_another_adapter_weight_or_salt(second: Request) -> None:
    """vLLM #42125, #30931: the prefix cache served KV that another adapter (or the base) had computed."""
    bench = Bench()
    bench.submit(request(range(40), A))
    bench.run()
    bench.submit(second)
    bench.run()
    assert bench.end(second).usage.cached_prompt_tokens == 0
    assert bench.tokens(second) == expected(second.prompt_ids, second.adapters)


def test_a_mix_in_another_order_is_the_same_mix() -> None:
    bench = Bench()
    one = request(range(40), AdapterUse(A, 0.5), AdapterUse(B, 2.0))
    other = request(range(40), AdapterUse(B, 2.0), AdapterUse(A, 0.5))
    bench.submit(one)
    bench.run()
    bench.submit(other)
    bench.run()
    assert bench.end(other).usage.cached_prompt_tokens == 36
    assert bench.tokens(one) == bench.tokens(other)


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    bench = Bench()
    first = request(range(20), max_new_tokens=12)
    bench.submit(first)
    bench.run()
    second = request([*first.prompt_ids, *bench.tokens(first), 1, 2, 3])
    bench.submit(second)
    bench.run()
    assert bench.end(second).usage.cached_prompt_tokens == 28  # 31 computed before, in blocks of 4
    assert bench.tokens(second) == expected(second.prompt_ids)


def test_n_sequences_compute_the_prompt_once() -> None:
    bench = Bench(max_batch_rows=4)
    r = request(range(41), A, n=3, temperature=1.0, seed=5)
    bench.submit(r)
    bench.run()
    computed = bench.engine.stats().computed_tokens
    assert computed == 41 + 2 * 1 + 3 * 7  # the forks compute only the prompt's last token
    texts = [bench.tokens(r, i) for i in range(3)]
    assert len({tuple(t) for t in texts}) == 3
    ends = [e for e in bench.events[r] if isinstance(e, SequenceFinished)]
    assert sorted(e.index for e in ends) == [0, 1, 2]
    assert [e.last for e in ends] == [False, False, True]
    assert ends[-1].usage.completion_tokens == 24
    assert ends[-1].usage.prompt_tokens == 41
    bench.assert_baseline()


def test_n_greedy_sequences_are_equal_even_in_a_tiny_cache() -> None:
    bench = Bench(FakeModel(num_kv_blocks=9))
    r = request(range(20), n=4)
    bench.submit(r)
    bench.run()
    for i in range(4):
        assert bench.tokens(r, i) == expected(r.prompt_ids)
    bench.assert_baseline()


def test_seed_gives_the_same_text_in_any_surroundings() -> None:
    """The draw depends on (seed, sequence, position) only: not on the batch, its order, chunks or preemption."""
    seeded: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 1234, "max_new_tokens": 30, "n": 2}
    texts = []
    for blocks, tokens, others in ((64, 512, 0), (64, 9, 5), (24, 32, 5)):
        bench = Bench(FakeModel(num_kv_blocks=blocks), max_batch_tokens=tokens)
        crowd = [request(range(i, 9 + i), temperature=1.0, max_new_tokens=30) for i in range(others)]
        r = request([3, 1, 4, 1, 5], **seeded)
        bench.submit(*crowd[:3], r, *crowd[3:])
        bench.run()
        texts.append([bench.tokens(r, i) for i in range(2)])
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] != texts[0][1]


def test_requests_without_a_seed_differ() -> None:
    bench = Bench()
    one, two = (request([1, 2], temperature=1.0, max_new_tokens=16) for _ in range(2))
    bench.submit(one, two)
    bench.run()
    assert bench.tokens(one) != bench.tokens(two)


def test_end_token_ends_the_text_and_is_not_in_it() -> None:
    prompt = next(p for p in ([i, j] for i in range(256) for j in range(8)) if EOS in expected(p, count=20))
    ids = expected(prompt, count=20)
    at = ids.index(EOS)
    bench = Bench()
    r = request(prompt, ignore_eos=False, max_new_tokens=40)
    bench.submit(r)
    bench.run()
    assert bench.tokens(r) == ids[: at + 1]
    assert bench.end(r).reason is FinishReason.STOP
    assert bench.text(r) == bytes(ids[:at]).decode(errors="replace")


def test_stop_tokens_and_min_new_tokens() -> None:
    ids = expected([1, 2, 3], count=6)
    free = request([1, 2, 3], stop_token_ids=frozenset({ids[4]}))
    bench = Bench()
    bench.submit(free)
    bench.run()
    assert bench.tokens(free) == ids[:5]
    assert bench.end(free).reason is FinishReason.STOP
    late = request([1, 2, 3], stop_token_ids=frozenset({ids[0]}), min_new_tokens=3)
    bench.submit(late)
    bench.run()
    assert ids[0] not in bench.tokens(late)[:3], "masked until min_new_tokens are there"
    assert len(bench.tokens(late)) >= 3


def test_stop_string_is_cut_and_named() -> None:
    """Bytes 0…127 only, so that text and tokens correspond; the stop string spans two tokens."""
    ascii_only = dict.fromkeys(range(128, VOCAB), -100.0)
    bench = Bench()
    free = request("hello", logit_bias=ascii_only, max_new_tokens=20)
    bench.submit(free)
    bench.run()
    text = bench.text(free)
    stop = text[6:8]
    stopped = request("hello", logit_bias=ascii_only, max_new_tokens=20, stop=("never there", stop))
    bench.submit(stopped)
    bench.run()
    assert bench.text(stopped) == text[: text.index(stop)]
    assert bench.end(stopped).stop == stop
    assert bench.end(stopped).reason is FinishReason.STOP


def test_logprobs_of_each_token() -> None:
    bench = Bench()
    r = request([1, 2, 3], top_logprobs=3, max_new_tokens=5)
    bench.submit(r)
    bench.run()
    items = [item for e in bench.events[r] if isinstance(e, Delta) for item in e.logprobs]
    assert [item.token_id for item in items] == bench.tokens(r)
    for item in items:
        assert len(item.top) == 3
        assert item.top[0].token_id == item.token_id  # greedy
        assert item.top[0].logprob == item.logprob >= item.top[1].logprob >= item.top[2].logprob


def test_context_end_bounds_the_output() -> None:
    bench = Bench(FakeModel(max_context=16))
    r = request(range(10), max_new_tokens=100)
    bench.submit(r)
    bench.run()
    assert len(bench.tokens(r)) == 6
    assert bench.end(r).reason is FinishReason.LENGTH

"""A request's answer, to the last bit of its log probabilities, does not depend on who shares its batches.

The first layers of the embedded model on whatever operations this machine serves it with, and the real engine; 200
prompts, each alone in an engine of its own against random company, chunk sizes, preemption and prefix-cache hits.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

import pytest
import torch
from loramux.engine.engine import Engine
from loramux.engine.request import AdapterUse, Delta, Event, Request, SamplingParams, SequenceFinished
from loramux.engine.settings import EngineSettings
from loramux.model.loading import LoadedModel, load_model
from loramux.model.sources import open_source
from loramux.ops.segment import AdapterWeights, LoraWeights
from loramux.ops.site import Site

from tests.engine.fakes import FakeAdapter
from tests.ops.test_native import flat

PROMPTS = 200
LAYERS = 4  # of 30, which all have the same shapes
BLOCK = 16
Answer = tuple[tuple[int, ...], tuple[bytes, ...]]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    source = open_source("smollm2")
    source.config.num_hidden_layers = LAYERS
    return load_model(source)


def random_adapter(sites: Sequence[Site], rank: int, targets: tuple[str, ...], seed: int, dora: bool) -> AdapterWeights:
    """Strong enough to change most answers."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * 0.08).to(torch.bfloat16)

    return flat(
        [
            LoraWeights(
                draw(rank, site.in_features),
                draw(site.out_features, rank) / rank**0.5,
                scale=1 + draw(site.out_features).float() if dora else None,
            )
            if site.name.endswith(targets)
            else None
            for site in sites
        ]
    )


@pytest.fixture(scope="module")
def requests(loaded: LoadedModel) -> list[Request]:
    choose = random.Random(0)
    kinds = [
        (1, ("q_proj",), False),
        (3, ("q_proj", "v_proj"), False),
        (8, ("_proj",), False),
        (16, ("_proj",), False),
        (64, ("down_proj",), False),
        (5, ("_proj",), True),
    ]
    adapters = [
        FakeAdapter(f"a{i}", f"a{i}-1", weights=random_adapter(loaded.model.sites, rank, targets, i, dora))
        for i, (rank, targets, dora) in enumerate(kinds)
    ]
    mixes: list[tuple[AdapterUse, ...]] = [(), *((AdapterUse(a),) for a in adapters)]
    mixes.append((AdapterUse(adapters[1], 0.5), AdapterUse(adapters[3], -0.75)))
    beginnings = [[choose.randrange(49152) for _ in range(40)] for _ in range(4)]
    made = []
    for i in range(PROMPTS):
        shared = choose.choice(beginnings)[: choose.choice((0, 0, 16, 33))]
        prompt = shared + [choose.randrange(49152) for _ in range(choose.randint(1, 24))]
        # A few long answers: they outgrow what was set aside for them, and somebody is preempted.
        length = 32 if i % 16 == 0 else choose.randint(1, 5)
        sampling = SamplingParams(max_new_tokens=length, ignore_eos=True, logprobs=True, top_logprobs=2)
        made.append(Request(f"r{i}", tuple(prompt), sampling, adapters=choose.choice(mixes)))
    return made


class Run:
    """One engine over the shared model, with a KV cache of its own size."""

    def __init__(self, loaded: LoadedModel, blocks: int, *, prefix_caching: bool, rows: int, tokens: int) -> None:
        assert loaded.tokenizer is not None
        loaded.model.allocate_kv(blocks, BLOCK)
        settings = EngineSettings(
            block_size=BLOCK, max_batch_rows=rows, max_batch_tokens=tokens, prefix_caching=prefix_caching
        )
        self.engine = Engine(loaded.model, loaded.tokenizer.backend, settings, on_finish=lambda request: None)
        self.events: dict[Request, list[Event]] = {}

    def submit(self, request: Request) -> None:
        self.events[request] = []
        self.engine.submit(request, self.events[request].append)

    def finish(self) -> None:
        while self.engine.step():
            pass

    def answer(self, request: Request) -> Answer:
        assert isinstance(self.events[request][-1], SequenceFinished), self.events[request][-1]
        deltas = [event for event in self.events[request] if isinstance(event, Delta)]
        logprobs = [entry for delta in deltas for entry in delta.logprobs]
        numbers = [n for entry in logprobs for n in (entry.logprob, *(top.logprob for top in entry.top))]
        return tuple(i for delta in deltas for i in delta.token_ids), tuple(struct.pack("<d", n) for n in numbers)


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, requests: list[Request]) -> dict[str, Answer]:
    run = Run(loaded, 64, prefix_caching=False, rows=1, tokens=512)
    for request in requests:
        run.submit(request)
        run.finish()
    return {request.request_id: run.answer(request) for request in requests}


def different(run: Run, requests: list[Request], alone: dict[str, Answer]) -> list[str]:
    return [request.request_id for request in requests if run.answer(request) != alone[request.request_id]]


def test_alone_is_not_all_the_same(requests: list[Request], alone: dict[str, Answer]) -> None:
    assert len(set(alone.values())) > PROMPTS * 0.9
    assert all(len(logprobs) == 3 * len(ids) for ids, logprobs in alone.values())


def test_in_chunks_and_preempted(loaded: LoadedModel, requests: list[Request], alone: dict[str, Answer]) -> None:
    """The KV cache is too small for those that run together, so some are put back and computed again."""
    run = Run(loaded, 14, prefix_caching=False, rows=12, tokens=16)
    for request in sorted(requests, key=lambda r: -r.sampling.max_new_tokens):
        run.submit(request)
    run.finish()
    assert run.engine.stats().preemptions > 0
    assert different(run, requests, alone) == []


def test_in_random_company_and_from_the_prefix_cache(
    loaded: LoadedModel, requests: list[Request], alone: dict[str, Answer]
) -> None:
    """They come a few at a time, while others are at work; then all again, in another order, to read from the cache."""
    choose = random.Random(37)
    run = Run(loaded, 2048, prefix_caching=True, rows=16, tokens=37)
    waiting = choose.sample(requests, len(requests))
    while waiting:
        for _ in range(min(len(waiting), choose.randint(0, 3))):
            run.submit(waiting.pop())
        run.engine.step()
    run.finish()
    assert different(run, requests, alone) == []
    before = run.engine.stats().prefix_hit_tokens
    for request in choose.sample(requests, len(requests)):
        run.submit(request)
    run.finish()
    assert run.engine.stats().prefix_hit_tokens - before > 2000
    assert different(run, requests, alone) == []

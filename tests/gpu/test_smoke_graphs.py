"""Model, kernels, adapters and CUDA graphs together: replayed steps beside launched ones, over other adapters, and
while a thread places adapters and frees them.

Without a GPU the kernels are interpreted and graphs are a tape of launches, and what tests/model/test_graphs.py has in
that way too is left to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.ops.test_triton_linear import flat
from tests.ops.triton_device import DEVICE

pytest.importorskip("triton")

from loramux.lora.staging import to_device
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.inputs import ModelInputs
from loramux.model.loading import load_model
from loramux.model.warm_up import warm_up
from loramux.ops.cuda.backend import TritonBackend
from loramux.ops.segment import AdapterWeights, LoraWeights, Segment

from tests.model.tape import TapeRecorder
from tests.model.tiny import save_tiny

CUDA = DEVICE.type == "cuda"
BLOCK, CONTEXT, VOCABULARY = 16, 64, 128
# One input is wider than a share of lora_down's, and its blocks are no multiple of anything.
SIZES = {"hidden_size": 1024, "intermediate_size": 4160, "head_dim": 128, "num_hidden_layers": 2} if CUDA else {}
# As many as graphs are recorded for, so that both ways have the same tiles.
ROWS = (1, 8, 32) if CUDA else (2,)
STEPS = 3 if CUDA else 2

on_a_device = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 8, "initializer_range": 0.05 if CUDA else 0.3} | SIZES
    folder = save_tiny("llama", tmp_path_factory.mktemp("model"), **sizes)
    return load_model(str(folder), device=DEVICE.type, dtype="bf16", backend=TritonBackend(DEVICE)).model


@pytest.fixture(scope="module")
def captured(model: CausalLM) -> CausalLM:
    """With a cache for the most rows, and graphs."""
    model.allocate_kv(ROWS[-1] * CONTEXT // BLOCK, BLOCK)
    if CUDA:
        warm_up(model, ROWS[-1], 64)  # else the ladder's kernels are compiled one after another
    caches = [t for cache in model._step.caches.values() for t in (cache.keys, cache.values)]
    model.capture_decode_steps(ROWS[-1], None if CUDA else TapeRecorder(lambda: caches))
    return model


def make_adapter(model: CausalLM, rank: int, seed: int, *, extras: bool = False) -> AdapterWeights:
    """Strong enough to change most answers."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    factors: list[LoraWeights | None] = []
    for site in model.sites:
        a, b = draw(rank, site.in_features) / site.in_features**0.5, draw(site.out_features, rank) / rank**0.5
        bias = draw(site.out_features).to(torch.bfloat16) if extras else None
        scale = 1 + draw(site.out_features) / 5 if extras else None
        factors.append(LoraWeights(a.to(torch.bfloat16), b.to(torch.bfloat16), bias, scale))
    return flat(factors, torch.bfloat16)


def prompts(rows: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(rows)
    return [torch.randint(3, VOCABULARY, (3 + i % 7,), generator=g).tolist() for i in range(rows)]


def greedy(model: CausalLM, rows: int, adapters: Sequence[tuple[int, int, float, AdapterWeights]]) -> list[Tensor]:
    """The logits of each step of greedy answers; adapters by sequences."""
    tokens, done, seen = prompts(rows), [0] * rows, []
    for _ in range(STEPS):
        starts = [0]
        for t, d in zip(tokens, done, strict=True):
            starts.append(starts[-1] + len(t) - d)
        segments = [Segment(starts[a], starts[b], weight, sites) for a, b, weight, sites in adapters]
        views = list(zip(tokens, done, strict=True))
        logits = model.forward(flat_inputs(views, BLOCK, segments, "last", CONTEXT)).clone()
        done = [len(t) for t in tokens]
        for t, row in zip(tokens, logits, strict=True):
            t.append(int(row.argmax()))
        seen.append(logits)
    return seen


@contextmanager
def launched(model: CausalLM) -> Iterator[None]:
    """Without graphs."""
    graphs, model.graphs = model.graphs, None
    try:
        yield
    finally:
        model.graphs = graphs


def both_ways(
    model: CausalLM, rows: int, adapters: Sequence[tuple[int, int, float, AdapterWeights]], *, exact: bool
) -> list[Tensor]:
    """The logits of replayed steps, which are those of launched ones. Exact where both run the very same kernels."""
    with launched(model):
        expected = greedy(model, rows, adapters)
    with counted(model) as replayed:
        got = greedy(model, rows, adapters)
    assert len(replayed) == STEPS - 1, "decode steps were not replayed"
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.isfinite(mine).all()
        if exact:
            assert torch.equal(mine, theirs)
        error = float((mine - theirs).float().norm() / theirs.float().norm())
        assert error < 1e-2, f"{rows} rows, {len(adapters)} adapters: replayed and launched differ by {error:.1e}"
    return got


@contextmanager
def counted(model: CausalLM) -> Iterator[list[int]]:
    """The rows of each step that is replayed."""
    graphs, rows = model.graphs, []
    assert graphs is not None
    run = graphs.run

    def counting(inputs: ModelInputs) -> Tensor | None:
        logits = run(inputs)
        if logits is not None:
            rows.append(len(logits))
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "run", counting)
        yield rows


@on_a_device
@pytest.mark.parametrize("rows", ROWS)
def test_replayed_is_launched_for_the_base(captured: CausalLM, rows: int) -> None:
    both_ways(captured, rows, [], exact=True)


@on_a_device
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("rank", [16, 64])
def test_replayed_is_launched_for_an_adapter_a_row(captured: CausalLM, rows: int, rank: int) -> None:
    adapters = [(i, i + 1, 1.0, make_adapter(captured, rank, i)) for i in range(rows)]
    both_ways(captured, rows, adapters, exact=True)


def test_padded_rows_and_mixed_company(captured: CausalLM) -> None:
    """Other numbers of rows than are recorded; ranks of all sizes, a DoRA, a mix, rows of the base."""
    rows = 21 if CUDA else 2
    adapters = [(i, i + 1, 1.0, make_adapter(captured, (4, 8, 32, 100)[i % 4], i)) for i in range(rows // 2)]
    adapters.append((rows // 2, rows // 2 + 1, 0.5, make_adapter(captured, 8, 90, extras=True)))
    if rows > 2:
        adapters += [(rows - 3, rows - 1, w, make_adapter(captured, 16, 91 + i)) for i, w in enumerate((0.75, -0.5))]
    both_ways(captured, rows, adapters, exact=False)


@on_a_device
def test_after_a_swap_the_same_graphs_run_the_new_adapter(captured: CausalLM) -> None:
    assert captured.graphs is not None
    graphs = captured.graphs.count
    first, second = make_adapter(captured, 16, 1), make_adapter(captured, 16, 2)
    before = both_ways(captured, 1, [(0, 1, 1.0, first)], exact=True)
    first.buffer.fill_(torch.nan)  # it was unloaded, and its memory is another's
    after = both_ways(captured, 1, [(0, 1, 1.0, second)], exact=True)
    assert not torch.equal(before[-1], after[-1])
    assert captured.graphs.count == graphs


def test_while_adapters_are_placed_and_freed(captured: CausalLM) -> None:
    """Placed memory is neither what a replay writes nor what it reads, whenever it comes and goes."""
    adapters = [(i, i + 1, 1.0, make_adapter(captured, 16, i)) for i in range(ROWS[-1])]
    with launched(captured):
        expected = greedy(captured, ROWS[-1], adapters)
    stop, faults = threading.Event(), []

    def place() -> None:
        host = torch.full((4 << 20,), 7.0)
        while not stop.is_set():
            placed = to_device(host.clone(), DEVICE)
            if not bool((placed == 7.0).all()):
                faults.append("what was placed was overwritten")
            placed.fill_(torch.nan)
            del placed

    thread = threading.Thread(target=place)
    thread.start()
    try:
        for _ in range(20 if CUDA else 1):
            for mine, theirs in zip(greedy(captured, ROWS[-1], adapters), expected, strict=True):
                assert torch.equal(mine, theirs)
    finally:
        stop.set()
        thread.join()
    assert not faults

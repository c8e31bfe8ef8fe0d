"""The ladder of recorded decode steps: which is chosen, what is padded, what stays valid, and what it may take."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.graphs import DecodeGraphs, Room, Rung
from loramux.model.loading import load_model
from loramux.model.step import Step
from loramux.ops.backend import BoundSegments
from loramux.ops.cuda.backend import TritonBackend
from loramux.ops.segment import AdapterWeights, LoraWeights, Segment
from loramux.ops.site import Site
from torch import Tensor

from tests.model.tape import TapeRecorder
from tests.model.tiny import save_tiny
from tests.ops.test_native import flat
from tests.ops.triton_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the tape is for the CPU; tests/gpu has the real one")
CPU = torch.device("cpu")
BLOCK, VOCAB = 4, 32


@dataclass(frozen=True, slots=True, eq=False)
class Bound(BoundSegments):
    """A table of one number a segment: where it begins."""

    table: Tensor | None = None


class FakeBackend(TritonBackend):
    """Tables only: no kernel runs."""

    def __init__(self) -> None:
        self.bound = Bound(())

    def bind(self, segments: tuple[Segment, ...]) -> BoundSegments:
        return self.bound

    def reserve_segments(self, count: int, rows: int, max_rank: int, *, extras: bool) -> BoundSegments:
        return Bound((), torch.full((count,), -1))

    def rebind(self, segments: tuple[Segment, ...], into: BoundSegments) -> None:
        assert isinstance(into, Bound)
        assert into.table is not None
        into.table.fill_(-1)
        into.table[: len(segments)] = torch.tensor([segment.start for segment in segments])


class FakeShortcut:
    """Logits that tell what a row saw: its id, position, slot, context, blocks and the table of segments."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.rows: list[int] = []

    def run(self, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        batch, bound = self.step.batch, self.step.segments
        assert batch is not None
        assert isinstance(bound, Bound)
        self.rows.append(len(ids))
        seen = torch.zeros(len(ids), VOCAB)
        for i, column in enumerate((ids, positions, batch.slots, batch.context_lens, batch.query_starts[:-1])):
            seen[:, i] = column
        seen[:, 5 : 5 + batch.block_tables.shape[1]] = batch.block_tables
        if bound.table is not None:
            seen[:, 20 : 20 + min(4, len(bound.table))] = bound.table[:4]
        return seen.index_select(0, rows)


class Scene:
    def __init__(self, max_rows: int = 8, **knobs: int) -> None:
        self.step = Step(FakeBackend(), lambda *_: pytest.fail("no cache is made here"))
        self.shortcut = FakeShortcut(self.step)
        self.recorder = TapeRecorder()
        self.graphs = DecodeGraphs(
            self.shortcut,  # type: ignore[arg-type]
            self.step,
            self.recorder,
            CPU,
            max_rows=max_rows,
            max_context=32,
            block_size=BLOCK,
            **knobs,
        )

    def decode(self, contexts: Sequence[int], segments: Sequence[Segment] = ()) -> Tensor | None:
        inputs = flat_inputs([([7 + c] * c, c - 1) for c in contexts], BLOCK, segments, "last")
        got = self.graphs.run(inputs)
        if got is not None:
            batch = torch.stack([inputs.token_ids, inputs.positions, inputs.slots, inputs.context_lens.long()], 1)
            assert torch.equal(got[:, :4], batch.float())
            for row, table, context in zip(got, inputs.block_tables, contexts, strict=True):
                used = -(-context // BLOCK)
                assert row[5 : 5 + used].tolist() == table[:used].tolist()
            if segments:
                starts = [segment.start for segment in segments][:4]
                assert got[0, 20 : 20 + len(starts)].tolist() == starts
        return got


def make_adapter(sites: Sequence[Site], rank: int, seed: int, **which: bool) -> AdapterWeights:
    """Strong enough to change most answers."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) / 6).to(torch.bfloat16)

    return flat(
        [
            LoraWeights(
                draw(rank, s.in_features),
                draw(s.out_features, rank),
                bias=draw(s.out_features) if which.get("bias") else None,
            )
            for s in sites
        ]
    )


SITES = [Site(0, "q_proj", 64, 64)]


def test_first_eagerly_then_recorded_then_replayed() -> None:
    scene = Scene()
    for contexts in ([3, 9], [4, 10], [5, 11]):
        assert scene.decode(contexts) is not None
    assert (scene.shortcut.rows, scene.recorder.recorded, scene.recorder.replayed) == ([2, 2], 1, 2)


def test_the_next_size_is_taken_and_padded() -> None:
    scene = Scene(max_rows=12)
    for _ in range(3):
        assert scene.decode([3, 9, 5]) is not None
    assert scene.shortcut.rows == [4, 4]
    for sizes, rung in ((range(5, 9), 8), (range(9, 13), 12)):
        for size in sizes:
            assert scene.decode([3] * size) is not None
            assert scene.shortcut.rows[-1] == rung
    rest = scene.graphs._logits
    assert rest is not None
    scene.decode([3] * 5)
    scene.decode([3] * 5)
    assert rest[5:8, 2].tolist() == [-1, -1, -1], "slots of padding"
    assert rest[5:8, 3].tolist() == [0, 0, 0], "contexts of padding"


def test_what_does_not_fit_runs_eagerly() -> None:
    scene = Scene(max_rows=8)
    assert scene.decode([3] * 9) is None
    assert scene.graphs.run(flat_inputs([([1, 2, 3], 1), ([5], 0)], BLOCK, (), "last")) is None, "a chunk of two rows"
    half = flat_inputs([([1, 2], 1), ([5, 6], 1)], BLOCK, (), "last")
    half.logits_rows.resize_(1)
    assert scene.graphs.run(half) is None, "a row without logits"
    assert scene.shortcut.rows == []


def test_adapters_take_a_rung_of_their_own_and_share_it() -> None:
    scene = Scene()
    small, large = make_adapter(SITES, 3, 0), make_adapter(SITES, 17, 1)
    odd = make_adapter(SITES, 3, 2, bias=True)

    def met(*segments: tuple[int, int, AdapterWeights]) -> Rung:
        before = set(scene.graphs._met)
        assert scene.decode([3, 4, 5], [Segment(a, b, 1.0, w) for a, b, w in segments]) is not None
        (new,) = scene.graphs._met - before
        return new

    assert met() == Rung(4, 32, None)
    assert met((0, 2, small)) == Rung(4, 32, Room(1, 4, 16, False))
    assert met((0, 1, large)) == Rung(4, 32, Room(1, 4, 64, False))
    assert met((0, 1, odd)) == Rung(4, 32, Room(1, 4, 16, True))
    assert met((0, 1, small), (1, 2, small)) == Rung(4, 32, Room(4, 4, 16, False))
    assert met((0, 3, small), (0, 3, small)) == Rung(4, 32, Room(4, 8, 16, False))
    count = len(scene.graphs._met)
    scene.decode([3, 4, 5], [Segment(2, 3, 0.5, make_adapter(SITES, 9, 5))])
    assert len(scene.graphs._met) == count, "another adapter, another place, another weight: the same rung"
    wide = make_adapter(SITES, 300, 0)
    assert scene.decode([3], [Segment(0, 1, 1.0, wide)]) is None, "ranks beyond the ladder"


def test_recording_stops_when_the_memory_is_taken() -> None:
    scene = Scene(memory=2)
    for size in (1, 2, 4, 8, 1, 2, 4, 8):
        scene.decode([3] * size)
    assert scene.recorder.recorded == scene.graphs.count == 2
    assert scene.decode([3] * 8) is None
    assert scene.decode([3]) is not None, "what is recorded goes on"
    assert scene.recorder.replayed == 3


def test_a_recording_that_fails_is_no_step_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.decode([3])
    scene.recorder.fault = torch.OutOfMemoryError("seeded")
    assert scene.decode([3]) is None
    assert "seeded" in caplog.text
    scene.recorder.fault = None
    assert scene.decode([3]) is None, "nor is it tried again and again"


def test_no_adapter_is_kept() -> None:
    """A lease that has ended frees the adapter, graph or not."""
    scene = Scene()
    for _ in range(3):
        adapter = make_adapter(SITES, 3, 0)
        gone = weakref.ref(adapter.buffer)
        scene.decode([3], [Segment(0, 1, 1.0, adapter)])
        del adapter
        gc.collect()
        assert gone() is None


# The whole stack: real kernels in Triton's interpreter, recorded and replayed.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = save_tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=1)
    return load_model(str(folder), device="cpu", dtype="bf16", backend=TritonBackend(CPU)).model


PROMPTS = [[5, 17, 99, 3, 42], [7, 7, 12], [101, 44, 55, 66]]


def generate(model: CausalLM, adapters: Sequence[tuple[int, int, float, AdapterWeights]], steps: int) -> list[Tensor]:
    """The logits of each step of a greedy answer to PROMPTS; adapters by sequences."""
    tokens, done, seen = [list(p) for p in PROMPTS], [0] * len(PROMPTS), []
    for _ in range(steps):
        starts = [0]
        for t, d in zip(tokens, done, strict=True):
            starts.append(starts[-1] + len(t) - d)
        segments = [Segment(starts[a], starts[b], weight, sites) for a, b, weight, sites in adapters]
        views = list(zip(tokens, done, strict=True))
        logits = model.forward(flat_inputs(views, BLOCK, segments, "last", 16)).clone()
        done = [len(t) for t in tokens]
        for t, row in zip(tokens, logits, strict=True):
            t.append(int(row.argmax()))
        seen.append(logits)
    return seen


def test_replayed_over_other_adapters_it_is_what_launching_gives(model: CausalLM) -> None:
    """Also after a swap: the first adapter's memory is overwritten, and no graph is recorded anew."""
    model.allocate_kv(16, BLOCK)
    first, second = (make_adapter(model.sites, rank, rank, bias=True) for rank in (5, 16))
    other = make_adapter(model.sites, 9, 9, bias=True)
    cases = [
        [(0, 1, 1.0, first), (2, 3, 1.0, second)],
        [(0, 1, 1.0, other), (1, 3, -0.5, second)],
        [(0, 3, 0.5, first), (0, 3, 0.5, other)],
    ]
    plain = [generate(model, case, 3) for case in cases]
    recorder = TapeRecorder(lambda: [t for c in model._step.caches.values() for t in (c.keys, c.values)])
    model.capture_decode_steps(8, recorder)
    graphs = model.graphs
    assert graphs is not None
    for case, expected in zip(cases, plain, strict=True):
        if case is cases[1]:
            recorded = graphs.count
            first.buffer.fill_(float("nan"))  # it was unloaded, and its memory is another's
            got = generate(model, case, 3)
            assert graphs.count == recorded == 1
        elif case is cases[2]:
            first.buffer.copy_(make_adapter(model.sites, 5, 5, bias=True).buffer)
            got = generate(model, case, 3)
        else:
            got = generate(model, case, 3)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(plain[0][0], plain[1][0])
    assert recorder.launches > 0
    assert recorder.replayed == 4

"""The ladder of recorded decode steps: which is chosen, what is padded, what stays valid, and what it may take."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from loramux.errors import DeviceLost
from loramux.model import graphs
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.graphs import NO_ADAPTERS, DecodeGraphs, Rung, SegmentBounds, ladder, pool_bytes
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
    """A ladder, recorded; `knobs` are those of DecodeGraphs."""

    def __init__(
        self,
        max_rows: int = 8,
        *,
        max_context: int = 32,
        max_mix: int = 2,
        faults: Sequence[RuntimeError | None] = (),
        cost: int = 1,
        **knobs: int,
    ) -> None:
        self.step = Step(FakeBackend(), lambda *_: pytest.fail("no cache is made here"))
        self.shortcut = FakeShortcut(self.step)
        self.recorder = TapeRecorder(cost=cost)
        self.recorder.faults[:] = faults
        self.rungs = ladder(max_rows, max_context, max_mix)
        self.graphs = DecodeGraphs(
            self.shortcut,  # type: ignore[arg-type]
            self.step,
            self.recorder,
            CPU,
            rungs=self.rungs,
            block_size=BLOCK,
            **knobs,
        )
        self.told: list[tuple[int, int]] = []
        self.graphs.capture(lambda done, total: self.told.append((done, total)))
        self.first = list(self.shortcut.rows)
        self.shortcut.rows.clear()

    def ran(self, contexts: Sequence[int], *segments: tuple[int, int, AdapterWeights]) -> Rung | None:
        """The rung in which such a step was replayed; None if it must run eagerly."""
        replayed = self.recorder.replayed
        got = self.decode(contexts, [Segment(a, b, 1.0, w) for a, b, w in segments])
        assert (self.shortcut.rows, self.graphs.captures) == ([], self.recorder.recorded), "no launch, no new graph"
        assert self.recorder.replayed == replayed + (got is not None)
        return None if got is None else next(r for r, f in self.graphs._graphs.items() if f is self.recorder.last)

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


def test_all_is_recorded_at_start_each_after_an_eager_pass() -> None:
    scene = Scene(max_rows=2)
    assert scene.recorder.recorded == scene.graphs.count == scene.graphs.captures == len(scene.rungs) == 8
    assert scene.first == [rung.rows for rung in scene.rungs for _ in range(2)]
    assert scene.told == [(i + 1, 8) for i in range(8)]
    for contexts in ([3, 9], [4, 10], [5, 11]):
        assert scene.ran(contexts) == Rung(2, 32, NO_ADAPTERS)
    assert scene.recorder.recorded == 8


def test_the_ladder_is_short_and_its_largest_come_first() -> None:
    rungs = ladder(64, 131072, 8)
    assert len(rungs) == len(set(rungs)) == 9 * 4 * 4
    assert [r for r in rungs if r.adapters == NO_ADAPTERS][:9] == [
        Rung(rows, 1024, NO_ADAPTERS) for rows in (64, 48, 32, 24, 16, 8, 4, 2, 1)
    ]
    assert {r.context for r in rungs} == {1024, 8192, 65536, 131072}
    assert {r.adapters for r in rungs if r.rows == 48} == {
        NO_ADAPTERS,
        SegmentBounds(48, 48, 16, False),
        SegmentBounds(48, 48, 64, False),
        SegmentBounds(96, 96, 256, True),
    }
    assert max(r.rows for r in ladder(300, 32, 1)) == 256
    assert {r.context for r in ladder(1, 500_000, 1)} == {1024, 8192, 65536, 262144}


def test_the_next_size_is_taken_and_padded() -> None:
    scene = Scene(max_rows=12)
    for size, rows in ((3, 4), (5, 8), (8, 8), (9, 12), (12, 12), (1, 1)):
        assert scene.ran([3] * size) == Rung(rows, 32, NO_ADAPTERS)
    rest = scene.graphs._logits
    assert rest is not None
    scene.decode([3] * 8)
    scene.decode([3] * 5)
    assert rest[5:8, 2].tolist() == [-1, -1, -1], "slots of padding"
    assert rest[5:8, 3].tolist() == [0, 0, 0], "contexts of padding"


def test_what_does_not_fit_runs_eagerly() -> None:
    scene = Scene(max_rows=8)
    assert scene.ran([3] * 9) is None
    assert scene.graphs.run(flat_inputs([([1, 2, 3], 1), ([5], 0)], BLOCK, (), "last")) is None, "a chunk of two rows"
    half = flat_inputs([([1, 2], 1), ([5, 6], 1)], BLOCK, (), "last")
    half.logits_rows.resize_(1)
    assert scene.graphs.run(half) is None, "a row without logits"
    assert scene.ran([3], (0, 1, make_adapter(SITES, 300, 0))) is None, "ranks beyond the ladder"
    small = make_adapter(SITES, 3, 0)
    assert scene.ran([3] * 8, *[(0, 8, small)] * 3) is None, "a mix of three in every row"
    assert scene.recorder.recorded == len(scene.rungs), "nor is a graph made for it"


def test_adapters_take_a_rung_of_their_own_and_share_it() -> None:
    scene = Scene()
    small, middle, large = (make_adapter(SITES, rank, rank) for rank in (3, 17, 65))
    odd = make_adapter(SITES, 3, 2, bias=True)
    plain, any_of_4 = Rung(4, 32, SegmentBounds(4, 4, 16, False)), Rung(4, 32, SegmentBounds(8, 8, 256, True))
    three = [3, 4, 5]
    assert scene.ran(three) == Rung(4, 32, NO_ADAPTERS)
    assert scene.ran(three, (0, 2, small)) == plain
    assert scene.ran(three, (0, 1, small), (1, 2, small), (2, 3, small)) == plain
    assert scene.ran(three, (0, 1, small), (2, 3, middle)) == Rung(4, 32, SegmentBounds(4, 4, 64, False))
    assert scene.ran(three, (0, 1, large)) == any_of_4
    assert scene.ran(three, (0, 1, odd)) == any_of_4
    assert scene.ran(three, (0, 3, small), (0, 3, small)) == any_of_4, "a mix of two in every row"
    assert scene.ran(three, *[(0, 3, small)] * 4) == Rung(8, 32, SegmentBounds(16, 16, 256, True)), (
        "more segments, more rows"
    )
    assert scene.ran([3], (0, 1, make_adapter(SITES, 9, 5))) == Rung(1, 32, SegmentBounds(1, 1, 16, False))


def test_of_a_table_of_blocks_only_those_of_the_rung_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the longest context's were: 2 MB a step at 64 rows and 128k tokens."""
    monkeypatch.setattr(graphs, "CONTEXTS", (8, 64, 4096))
    scene = Scene(max_rows=4, max_context=4096)
    copied: list[int] = []
    plain = torch.Tensor.copy_

    def copy(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if into.dtype == torch.int32:
            copied.append(source.numel())
        return plain(into, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    for contexts, rung in (
        ([3, 8], Rung(2, 8, NO_ADAPTERS)),
        ([3, 9, 5], Rung(4, 64, NO_ADAPTERS)),
        ([7], Rung(1, 8, NO_ADAPTERS)),
    ):
        assert scene.ran(contexts) == rung
        assert copied.pop() == rung.rows * (7 + rung.context // BLOCK)
        assert not copied


def test_recording_stops_when_the_memory_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(memory=5, cost=2)
    assert scene.recorder.recorded == scene.graphs.count == 3
    assert "3 of 16 CUDA graphs have taken the others' memory" in caplog.text
    assert [scene.ran([3] * size) for size in (8, 3, 1)] == [Rung(rows, 32, NO_ADAPTERS) for rows in (8, 4, 2)]
    assert scene.ran([3], (0, 1, make_adapter(SITES, 3, 0))) is None, "no larger one takes adapters"


def test_what_is_not_recorded_runs_in_a_larger_one(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(faults=[None, RuntimeError("seeded")])
    assert "seeded" in caplog.text
    assert scene.graphs.count == 15
    assert scene.ran([3] * 3) == Rung(4, 32, SegmentBounds(4, 4, 16, False)), "an empty table is the base"
    assert scene.ran([3] * 5) == Rung(8, 32, NO_ADAPTERS)


def test_memory_that_was_short_for_a_moment_is_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(faults=[None, torch.OutOfMemoryError("seeded")])
    assert scene.graphs.count == 16
    assert "seeded" not in caplog.text
    assert scene.told[-1] == (16, 16)
    scene = Scene(faults=[*[None] * 15, *[torch.OutOfMemoryError("seeded")] * 2])
    assert scene.graphs.count == 15
    assert "seeded" in caplog.text


def test_what_a_failed_recording_has_computed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was kept until the end: where memory was short, it became shorter with each graph that failed."""
    held: list[weakref.ref[Tensor]] = []
    plain = FakeShortcut.run

    def run(self: FakeShortcut, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        if not held:
            computed = plain(self, ids, positions, rows)
            held.append(weakref.ref(computed))
            raise torch.OutOfMemoryError("seeded")
        assert held[0]() is None
        return plain(self, ids, positions, rows)

    monkeypatch.setattr(FakeShortcut, "run", run)
    assert Scene().graphs.count == 16


def test_a_device_that_is_lost_ends_the_recording() -> None:
    with pytest.raises(DeviceLost):
        Scene(faults=[None, torch.AcceleratorError("CUDA error: an illegal memory access was encountered")])


def test_only_the_pool_of_the_graphs_is_counted() -> None:
    """Free memory was: what a worker placed was charged to the graphs, and what a cache gave back was theirs."""
    own, default = (0, 7), (0, 0)
    before = [{"segment_pool_id": own, "total_size": 2 << 20}, {"segment_pool_id": default, "total_size": 20 << 20}]
    assert pool_bytes(before, own) == 2 << 20
    placed = [*before, {"segment_pool_id": default, "total_size": 600 << 20}]
    assert pool_bytes(placed, own) == 2 << 20, "an adapter was placed meanwhile"
    given_back = before[:1]
    assert pool_bytes(given_back, own) == 2 << 20, "the cache was emptied meanwhile"
    assert pool_bytes([], own) == 0


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


def test_replayed_over_other_adapters_it_is_what_launching_gives(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(graphs, "ROWS", (4,))
    model.capture_decode_steps(8, recorder)
    for case, expected in zip(cases, plain, strict=True):
        if case is cases[1]:
            first.buffer.fill_(float("nan"))  # it was unloaded, and its memory is another's
        elif case is cases[2]:
            first.buffer.copy_(make_adapter(model.sites, 5, 5, bias=True).buffer)
        got = generate(model, case, 3)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(plain[0][0], plain[1][0])
    assert recorder.launches > 0
    assert recorder.replayed == 2 * len(cases), "all steps but the first of each, which are prompts"
    assert model.graphs is not None
    assert model.graphs.count == recorder.recorded == 4

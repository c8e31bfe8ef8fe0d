"""What a start makes ready, and that serving then asks for nothing else: a compile or a capture halts every stream."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loramux import assembly
from loramux.config import Settings
from loramux.engine.engine import Engine
from loramux.engine.settings import EngineSettings
from loramux.model import causal_lm, graphs, warm_up
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.loading import LoadedModel, load_model
from loramux.ops.cuda import precompile
from loramux.ops.cuda.backend import TritonBackend
from loramux.ops.cuda.linear import DENSE_ROWS, Operation
from loramux.ops.cuda.precompile import Shapes
from loramux.ops.cuda.sampling import greedy
from loramux.ops.cuda.segments import TritonSegments
from loramux.ops.segment import Segment
from loramux.progress import Count, Phases
from loramux.values import Memory
from torch import Tensor
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

from tests.engine.fakes import adapter, byte_tokenizer, request
from tests.model.tape import TapeRecorder
from tests.model.test_graphs import make_adapter
from tests.model.tiny import save_tiny
from tests.ops.triton_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="what is launched is looked at where the interpreter is")
CPU = torch.device("cpu")
BLOCK = 4


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "invariant"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = save_tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=1, max_position_embeddings=1024)
    backend = TritonBackend(CPU, batch_invariant=request.param)
    return load_model(str(folder), device="cpu", dtype="bf16", backend=backend).model


class Launches:
    """In the place of running kernels, the key that each would be compiled for."""

    def __init__(self) -> None:
        self.met: set[object] = set()

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        plain = kernel.kwargs.get("do_not_specialize") or ()
        unaligned = kernel.kwargs.get("do_not_specialize_on_alignment") or ()
        key = [
            (name, _specialized(value, name not in plain, name not in unaligned))
            for name, value in zip(kernel.arg_names, args, strict=False)
        ]
        self.met.add((kernel.fn.__name__, *key, *sorted(constants.items())))


def _specialized(value: object, specialize: bool, aligned: bool) -> object:
    """As Triton does; its own key is computed in C, for a device."""
    if isinstance(value, Tensor):
        return value.dtype, aligned and specialize and value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return value >= 1 << 31, specialize and (value == 1, value % 16 == 0)
    return value if value is None else type(value)


class NoRecorder:
    """`graphs.Recorder` of launches that are only looked at."""

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        launch()
        return lambda: None

    def held_bytes(self) -> int:
        return 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    seen = Launches()
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *args, **kwargs: seen(kernel, *args, **kwargs))
    monkeypatch.setattr(warm_up, "select_greedy", lambda device: greedy)
    return seen


def test_serving_launches_nothing_that_the_start_has_not(model: CausalLM, launches: Launches) -> None:
    """Any step: prompts, decoding and both, of any length, with adapters of any rank, beside others."""
    most_rows, most_tokens, draw = 6, 520, random.Random(0)
    model.allocate_kv(800, BLOCK)
    warm_up.warm_up(model, most_rows, most_tokens)
    model.capture_decode_steps(most_rows, NoRecorder(), max_mix=2)
    ready = set(launches.met)
    adapters = [
        make_adapter(model.sites, rank, rank, bias=bias)
        for rank in (1, 16, 17, 33, 64, 65, 300)
        for bias in (False, True)
    ]
    for _ in range(150):
        rows = [1] * draw.randint(0, most_rows)
        if draw.random() < 0.7:
            left = most_tokens - len(rows)
            rows += [draw.choice([left, draw.randint(1, left), draw.randint(1, min(left, 140))])]
        rows = rows or [1]
        views = [([1] * (length + (cached := draw.randint(0, 300))), cached) for length in rows]
        segments = []
        for start in range(draw.choice([0, len(rows)])):
            begin, end = sum(rows[:start]), sum(rows[: start + 1])
            segments += [Segment(begin, end, 1.0, a) for a in draw.sample(adapters, draw.randint(0, 2))]
        greedy(model.forward(flat_inputs(views, BLOCK, segments, "last")))
        assert not launches.met - ready, sorted(map(str, launches.met - ready))[0]


def test_a_start_makes_all_ready_before_it_ends(
    model: CausalLM, launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[str] = []
    monkeypatch.setattr(assembly, "load_model", lambda *_, **__: LoadedModel(model, None, tmp_path, None))
    monkeypatch.setattr(CausalLM, "can_capture", True)
    monkeypatch.setattr(causal_lm, "CudaRecorder", lambda device: NoRecorder())
    monkeypatch.setattr(
        TritonBackend, "precompile", lambda self, rows, ranks, progress: done.append(f"precompiled for {rows}, {ranks}")
    )

    class Told(Phases):
        def begin(self, title: str) -> None:
            done.append(title)

        def counting(self, title: str) -> Count:
            return lambda step, total: done.append(title) if step == total else None

    settings = Settings(device="cpu", max_batch_rows=3, max_batch_tokens=5, kv_memory=Memory(bytes=1 << 20))
    assembly.prepare_model(settings, Told(None))
    assert done[-4:] == [
        "Making the KV cache",
        "precompiled for (5,), (16, 32, 64)",
        "Running each kind of step once",
        "Capturing decode steps",
    ]
    assert model.graphs is not None
    assert model.graphs.count == model.graphs.captures == 3 * 4


@pytest.mark.parametrize("most", [7, 300, 512])
@pytest.mark.parametrize(
    "operation",
    [
        Operation(4096, (4096, 1024, 1024)),
        Operation(4096, (4096,)),
        Operation(14_336, (4096,)),
        Operation(2048, (2048, 512, 512)),
        Operation(8192, (2048,)),
        Operation(4864, (896,)),
    ],
)
def test_any_number_of_rows_launches_what_the_passes_did(launches: Launches, operation: Operation, most: int) -> None:
    """At the shapes of Llama-3-8B, Llama-3.2-1B and Qwen2-0.5B, whose K is cut into shares by the number of tiles."""
    linear = precompile._linear(operation, Shapes((operation,), (), 64, 0))

    def met(rows: int) -> set[object]:
        launches.met.clear()
        x = torch.empty(rows, operation.inputs, dtype=torch.bfloat16, device="meta")
        linear.run(x, TritonSegments.reserve(1, rows, 16, x.device, extras=False))
        return set(launches.met)

    counts = TritonBackend(CPU).row_counts(most)
    assert max(counts) == most
    ready = set.union(*(met(rows) for rows in counts if rows < DENSE_ROWS))
    assert len(ready) >= 2
    assert all(met(rows) <= ready for rows in range(1, min(most + 1, DENSE_ROWS)))


def test_the_passes_of_sequences() -> None:
    assert warm_up.sequence_counts(65) == (1, 2, 4, 8, 16, 32, 64, 65)
    assert warm_up.sequence_counts(1) == (1,)


def test_no_pass_writes_a_key_and_what_is_served_adds_no_graph(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real kernels, and the engine; a compile that came later would be counted."""
    monkeypatch.setattr(graphs, "ROWS", (2,))
    monkeypatch.setattr(graphs, "RANKS", (16,))
    monkeypatch.setattr(warm_up, "RANKS", (16,))
    model.allocate_kv(32, BLOCK)
    told: list[tuple[int, int]] = []
    warm_up.warm_up(model, 2, 3, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == len(told)
    recorder = TapeRecorder(lambda: [t for c in model._step.caches.values() for t in (c.keys, c.values)])
    model.capture_decode_steps(2, recorder)
    assert all(not bool(t.any()) for t in recorder.written()), "a pass has written keys"
    recorded = recorder.recorded
    assert recorded == 3

    settings = EngineSettings(max_batch_rows=2, max_batch_tokens=3, block_size=BLOCK)
    engine = Engine(model, byte_tokenizer(), settings, on_finish=lambda request: None)
    lora = adapter("a")
    lora.weights = make_adapter(model.sites, 5, 5)
    ended: list[object] = []
    for asked in (request([5, 6, 7, 8], max_new_tokens=3), request([9], lora, max_new_tokens=3)):
        engine.submit(asked, ended.append)
    while engine.step():
        pass
    assert recorder.replayed >= 3
    assert engine.stats().steps > 3
    assert engine.stats().generated_tokens > 2
    assert (recorder.recorded, engine.stats().late_compilations) == (recorded, 0)
    assert knobs.compilation.listener is not None
    knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=True)  # type: ignore[arg-type]
    assert engine.stats().late_compilations == 1

"""The step table: milliseconds of one decoding step of a whole model, beside the bytes it cannot avoid to read; and
where they go, by kernel."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from loramux.model.causal_lm import flat_inputs
from loramux.model.graphs import CudaRecorder
from loramux.model.inputs import ModelInputs
from loramux.ops.segment import AdapterWeights, Segment
from torch.profiler import ProfilerActivity

from loadtest.gpu.models import milliseconds, random_adapter, served_model
from loadtest.gpu.report import Job

BLOCK = 16  # tokens of a KV block, as the server has it
PREFILL_ROWS = 2048
PROFILED = 10
MOST_KERNELS = 16


def steps(job: Job) -> None:
    """The rows that matter most, without mixed ranks."""
    StepBench(job, job.scale.first_rows).table()


def all_steps(job: Job) -> None:
    """Every number of rows, every kind of batch; then the price of batch invariance."""
    StepBench(job, job.scale.all_rows).table(job.scale.mixed_ranks)
    StepBench(job, job.scale.first_rows, invariant=True).table()


def profile(job: Job) -> None:
    """Rows of one step's kernels, for base and one adapter each."""
    bench = StepBench(job, job.scale.first_rows)
    for rows in job.scale.first_rows:
        bench.profile(rows, "base", [])
        bench.profile(rows, "one each", [random_adapter(bench.model, job.scale.rank) for _ in range(rows)])


class Recorder(CudaRecorder):
    """Knows which graph was replayed last."""

    last: Callable[[], None] | None = None

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        replay = super().record(launch)

        def run() -> None:
            self.last = replay
            replay()

        return run


class StepBench:
    """A loaded model with sequences in its KV cache. Steps are graphs, as when it is served."""

    def __init__(self, job: Job, rows: Sequence[int], *, invariant: bool = False) -> None:
        self._job, self._context, self._rows = job, job.scale.context, rows
        self._what = "loramux --batch-invariant" if invariant else "loramux"
        begin = time.monotonic()
        self.model = model = served_model(job.scale.model, job.scale.device, invariant=invariant)
        self.tokens = torch.randint(model.vocab_size, (max(rows), self._context)).tolist()
        model.allocate_kv(max(rows) * -(-self._context // BLOCK), BLOCK)
        self._recorder = Recorder(model.device) if model.can_capture else None
        if self._recorder:
            model.capture_decode_steps(max(rows), self._recorder)
        ready = time.monotonic()
        self.prefill()
        rate = max(rows) * (self._context - 1) / (time.monotonic() - ready)
        job.tell(
            note=f"{self._what}: random NF4 weights ({model.facts.nf4_bytes / 2**30:.2f} GiB), context "
            f"{self._context}, backend {model.facts.backend}, {model.graphs.count if model.graphs else 0} graphs; "
            f"ready in {ready - begin:.0f} s, then {rate:,.0f} tokens/s of prefill, compiling included."
        )

    def prefill(self) -> None:
        """All but the last token of every sequence, so that attention reads keys that the model has made. Raises
        ValueError if logits are not finite."""
        chunk, last = max(1, PREFILL_ROWS // len(self.tokens)), self._context - 1
        for start in range(0, last, chunk):
            views = [(tokens[: min(start + chunk, last)], start) for tokens in self.tokens]
            logits = self.model.forward(flat_inputs(views, BLOCK, (), "last", self._context))
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("prefill gave logits that are not finite")

    def table(self, mixed_ranks: Sequence[int] = ()) -> None:
        """A row for each number of rows and kind of batch. A tax is what adapters cost beside the base."""
        rank, most = self._job.scale.rank, max(self._rows)
        same = [random_adapter(self.model, rank) for _ in range(most)]
        mixed = [random_adapter(self.model, mixed_ranks[i % len(mixed_ranks)]) for i in range(most) if mixed_ranks]
        for rows in self._rows:
            batches = {"base": [], f"one, r={rank}": same[:1], f"one each, r={rank}": same[:rows]}
            if mixed_ranks:
                batches[f"one each, r={min(mixed_ranks)}–{max(mixed_ranks)}"] = mixed[:rows]
            took: dict[str, float] = {}
            for name, adapters in batches.items():
                with self._job.row(what=self._what, rows=rows, adapters=name) as row:
                    row["floor"] = self._bytes(rows, adapters) / self._job.bandwidth / 1e6
                    row |= self.measure(self.decode(rows, adapters))
                    took[name] = row["replay"] or row["forward"]
                    if adapters and "base" in took:
                        row["tax"] = f"{took[name] / took['base'] - 1:+.0%}"

    def measure(self, inputs: ModelInputs) -> dict[str, float | None]:
        """Milliseconds of a step: the replay of its graph alone, forwards launched one after another, and on the clock
        until its logits are there. Raises ValueError where there are graphs and none was replayed."""
        forward, replay, recorder = partial(self.model.forward, inputs), None, self._recorder
        if recorder:
            recorder.last = None
            forward()
            if recorder.last is None:
                raise ValueError("launched one by one")
            replay = milliseconds(recorder.last)
        clock = milliseconds(lambda: forward()[0, 0].item())
        return {"replay": replay, "forward": milliseconds(forward), "clock": clock}

    def decode(self, rows: int, adapters: Sequence[AdapterWeights]) -> ModelInputs:
        """One more token of the first `rows` sequences; one adapter for all of them, one for each, or none."""
        share = rows // max(1, len(adapters))
        segments = [Segment(i * share, (i + 1) * share, 1.0, weights) for i, weights in enumerate(adapters)]
        views = [(tokens, self._context - 1) for tokens in self.tokens[:rows]]
        return flat_inputs(views, BLOCK, segments, "last", self._context)

    def _bytes(self, rows: int, adapters: Sequence[AdapterWeights]) -> int:
        """What a step has to read at least: NF4 weights, the head, keys and values, adapters; each once."""
        head = self.model.dense_weights()["lm_head.weight"].nbytes
        cached = rows * self._context * self.model.kv_bytes_per_token
        return self.model.facts.nf4_bytes + head + cached + sum(adapter.buffer.nbytes for adapter in adapters)

    def profile(self, rows: int, name: str, adapters: Sequence[AdapterWeights]) -> None:
        """A row for each kernel and grid, the longest first: how often it runs in a step, and microseconds in all."""
        forward, cuda = partial(self.model.forward, self.decode(rows, adapters)), self.model.device.type == "cuda"
        forward()
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as watched:
            for _ in range(PROFILED):
                forward()[0, 0].item()
        # The profiler's own averages have no grids, which tell the launches of one kernel apart.
        with tempfile.NamedTemporaryFile(suffix=".json") as trace:
            watched.export_chrome_trace(trace.name)
            events = json.loads(Path(trace.name).read_text())["traceEvents"]
        spent: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") in (("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)):
                grid = "×".join(map(str, event["args"].get("grid", ())))
                spent[event["name"][:80], grid].append(event["dur"] / PROFILED)
        whole = sum(map(sum, spent.values()))
        for (kernel, grid), took in sorted(spent.items(), key=lambda item: -sum(item[1]))[:MOST_KERNELS]:
            found = {"kernel": kernel, "grid": grid, "times": len(took) / PROFILED, "µs": sum(took)}
            self._job.tell(row={"rows": rows, "adapters": name, **found, "share": f"{sum(took) / whole:.1%}"})
        self._job.tell(note=f"{rows} rows, {name}: {whole:,.0f} µs a step in {len(spent)} kinds of launches.")

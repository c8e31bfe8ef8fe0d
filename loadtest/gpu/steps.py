"""The step table: milliseconds that one decoding step of a whole model takes, beside the bytes it cannot avoid; and
where they go, by kernel."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loramux.model.causal_lm import flat_inputs
from loramux.model.inputs import ModelInputs
from loramux.ops.segment import AdapterWeights, Segment

from loadtest.gpu.random_model import RandomAdapters, load_random
from loadtest.gpu.report import Job, Row
from loadtest.gpu.timing import Took, synchronize, took, watch_replays

BLOCK = 16  # tokens of a KV block, as the server has it
PREFILL_ROWS = 2048
PROFILED = 10
MOST_KERNELS = 16


def steps(job: Job) -> None:
    """The rows that matter most, without mixed ranks."""
    StepBench(job, job.scale.first_rows).table(mixed=False)


def all_steps(job: Job) -> None:
    """Every number of rows, every kind of batch; then the price of batch invariance."""
    StepBench(job, job.scale.all_rows).table(mixed=True)
    StepBench(job, job.scale.first_rows, invariant=True).table(mixed=False)


def profile(job: Job) -> None:
    """Rows of one step's kernels, for base and one adapter each."""
    bench = StepBench(job, job.scale.first_rows)
    for rows in job.scale.first_rows:
        for name, adapters in (("base", 0), ("one each", rows)):
            job.attempt(f"profile, {rows} rows, {name}", partial(bench.profile, rows, name, adapters))


class StepBench:
    """A loaded model with sequences in its KV cache, and adapters for them. Steps are graphs, as when it is served."""

    def __init__(self, job: Job, rows: Sequence[int], *, invariant: bool = False) -> None:
        self._job, self._scale, self._rows = job, job.scale, rows
        self._what = "loramux --batch-invariant" if invariant else "loramux"
        job.report.at("loading")
        begin = time.monotonic()
        if job.scale.device == "cuda":
            watch_replays()
        self.model = model = load_random(job.scale.steps, torch.device(job.scale.device), invariant=invariant)
        self._sequences = max(rows)
        self.tokens = torch.randint(model.vocab_size, (self._sequences, job.scale.context)).tolist()
        model.allocate_kv(self._sequences * -(-job.scale.context // BLOCK), BLOCK)
        if model.can_capture:
            job.report.at("recording graphs")
            model.capture_decode_steps(self._sequences)
        job.report.note(
            f"{self._what}: {model.facts.name} shape, random NF4 weights ({model.facts.nf4_bytes / 2**30:.2f} GiB), "
            f"context {job.scale.context}, backend {model.facts.backend}; ready in {time.monotonic() - begin:.0f} s."
        )
        self.prefill()

    def prefill(self) -> None:
        """All but the last token of every sequence, so that attention reads keys that the model has made."""
        self._job.report.at("prefill")
        chunk = max(1, PREFILL_ROWS // self._sequences)
        last = self._scale.context - 1
        begin = time.monotonic()
        for start in range(0, last, chunk):
            views = [(tokens[: min(start + chunk, last)], start) for tokens in self.tokens]
            logits = self.model.forward(flat_inputs(views, BLOCK, (), "last", self._scale.context))
        if not bool(torch.isfinite(logits).all()):
            self._job.report.problem("prefill gave logits that are not finite")
        seconds, count = time.monotonic() - begin, self._sequences * last
        self._job.report.note(
            f"{self._what}: {self._sequences} prompts of {last} tokens were prefilled in {seconds:.1f} s, compiling "
            f"included, {count / seconds:,.0f} tokens/s."
        )

    def table(self, *, mixed: bool) -> None:
        """A row for each number of rows: milliseconds of the replayed graph alone, of the whole forward on the device
        and on the clock."""
        rank, ranks = self._scale.rank, self._scale.mixed_ranks
        same = RandomAdapters(self.model, [rank], self._sequences).adapters
        for rows in self._rows:
            with self._job.report.filling(what=self._what, rows=rows) as row:
                base = self._cell(row, rows, "base", [])
                one = self._cell(row, rows, "1 adapter", same[:1])
                each = self._cell(row, rows, f"one each, r={rank}", same[:rows])
                for name, cell in (("1 adapter", one), ("one each", each)):
                    if base and cell:
                        row[f"tax, {name}"] = f"{cell.best / base.best - 1:+.0%}"
        if not mixed:
            return
        del same
        spread = RandomAdapters(self.model, ranks, self._sequences).adapters
        for rows in self._rows:
            with self._job.report.filling(what=f"{self._what}, mixed ranks", rows=rows) as row:
                self._cell(row, rows, f"one each, r={min(ranks)}–{max(ranks)}", spread[:rows])

    def _cell(self, row: Row, rows: int, name: str, adapters: Sequence[AdapterWeights]) -> Took | None:
        spent = self._job.attempt(f"{rows} rows, {name}", partial(self._step, rows, adapters))
        if spent is None:
            return None
        row |= {name: spent.best, f"{name}, forward": spent.device_ms, f"{name}, clock": spent.wall_ms}
        if self._job.bandwidth:
            row[f"{name}, floor"] = self._bytes(rows, adapters) / self._job.bandwidth * 1e3
        graphs = self.model.graphs.count if self.model.graphs else 0
        row["graphs"] = graphs
        if self.model.device.type == "cuda" and (not graphs or spent.replay_ms is None):
            self._job.report.problem(f"{rows} rows, {name}: launched one by one, {graphs} graphs")
        return spent

    def _step(self, rows: int, adapters: Sequence[AdapterWeights]) -> Took:
        call = partial(self.model.forward, self.decode(rows, adapters))
        return took(call, self.model.device, warmups=self._scale.warmups, repeats=self._scale.repeats)

    def decode(self, rows: int, adapters: Sequence[AdapterWeights]) -> ModelInputs:
        """One more token of the first `rows` sequences; one adapter for all of them, one for each, or none."""
        share = rows // max(1, len(adapters))
        segments = [Segment(i * share, (i + 1) * share, 1.0, weights) for i, weights in enumerate(adapters)]
        views = [(tokens, self._scale.context - 1) for tokens in self.tokens[:rows]]
        return flat_inputs(views, BLOCK, segments, "last", self._scale.context)

    def _bytes(self, rows: int, adapters: Sequence[AdapterWeights]) -> int:
        """What a step has to read at least: NF4 weights, the head, keys and values, adapters; each once."""
        decoder = self._scale.steps
        head = decoder.vocab * decoder.hidden * self.model.dtype.itemsize
        cached = rows * self._scale.context * self.model.kv_bytes_per_token
        return self.model.facts.nf4_bytes + head + cached + sum(adapter.buffer.nbytes for adapter in adapters)

    def profile(self, rows: int, name: str, adapters: int) -> None:
        """A row for each kernel and grid, the longest first: how often it runs in a step, and microseconds in all."""
        weights = RandomAdapters(self.model, [self._scale.rank], adapters).adapters
        call = partial(self.model.forward, self.decode(rows, weights))
        cuda = self.model.device.type == "cuda"
        for _ in range(self._scale.warmups):
            call()
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as watched:
            for _ in range(PROFILED):
                call()
                synchronize(self.model.device)
        with tempfile.TemporaryDirectory() as folder:
            watched.export_chrome_trace(f"{folder}/trace.json")
            events: list[dict[str, Any]] = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        spent: dict[tuple[str, str, Any, Any], list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") if cuda else event.get("cat") == "cpu_op":
                more = event.get("args", {})
                grid = "×".join(map(str, more.get("grid", ())))
                key = event["name"][:80], grid, more.get("registers per thread"), more.get("shared memory")
                spent[key].append(float(event["dur"]))
        whole = sum(map(sum, spent.values()))
        longest = sorted(spent.items(), key=lambda item: -sum(item[1]))
        for (kernel, grid, registers, shared), took_us in longest[:MOST_KERNELS]:
            self._job.report.row({
                "rows": rows, "adapters": name, "kernel": kernel, "grid": grid, "registers": registers,
                "shared": shared, "times": len(took_us) / PROFILED, "µs": sum(took_us) / PROFILED,
                "share": f"{sum(took_us) / whole:.1%}",
            })  # fmt: skip
        self._job.report.note(
            f"{rows} rows, {name}: {whole / PROFILED:,.0f} µs a step in {len(spent)} kinds of launches."
        )

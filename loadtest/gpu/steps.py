"""The step table: milliseconds that one decoding step of a whole model takes, beside the bytes it cannot avoid."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from loramux.lora.adapter import Adapter
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.inputs import ModelInputs
from loramux.ops.segment import Segment

from loadtest.gpu.job import Job
from loadtest.gpu.random_adapter import RandomAdapters
from loadtest.gpu.random_model import NoSuchMode, load_random
from loadtest.gpu.report import Row
from loadtest.gpu.timing import Took, took

BLOCK = 16  # tokens of a KV block, as the server has it
PREFILL_ROWS = 2048


def steps(job: Job) -> None:
    """The server's model, every number of rows, every kind of batch."""
    measure(job, "loramux", invariant=False)


def invariant(job: Job) -> None:
    """The same in batch-invariant mode: its price."""
    try:
        measure(job, "loramux --batch-invariant", invariant=True)
    except NoSuchMode as reason:
        if job.scale.device == "cuda":
            job.report.problem(f"batch-invariant: {reason}")
        else:
            job.report.note(f"batch-invariant: {reason}.")


def measure(job: Job, what: str, *, invariant: bool) -> None:
    """A row of the table for each number of rows; in batch-invariant mode only for those that matter most."""
    scale, device = job.scale, torch.device(job.scale.device)
    job.report.at("loading")
    begin = time.monotonic()
    model = load_random(scale.steps, device, invariant=invariant)
    job.report.note(
        f"{what}: {model.facts.name} shape with random NF4 weights ({model.facts.nf4_bytes / 2**30:.2f} GiB), context "
        f"{scale.context}, backend {model.facts.backend}; made and loaded in {time.monotonic() - begin:.0f} s."
    )
    rows_wanted = scale.step_rows[:2] if invariant else scale.step_rows
    bench = StepBench(job, model, max(rows_wanted))
    job.report.at("prefill")
    begin = time.monotonic()
    bench.prefill()
    seconds = time.monotonic() - begin
    job.report.note(
        f"{what}: {bench.sequences} prompts of {scale.context - 1} tokens were prefilled in {seconds:.1f} s, warm-up "
        f"included, {bench.sequences * (scale.context - 1) / seconds:,.0f} tokens/s."
    )
    for rows in rows_wanted:
        with job.report.filling(what=what, rows=rows) as row:
            bench.fill(row, rows, mixed=not invariant)


class StepBench:
    """A loaded model with sequences in its KV cache, and adapters for them."""

    def __init__(self, job: Job, model: CausalLM, sequences: int) -> None:
        self._job, self._scale, self._model = job, job.scale, model
        self.sequences = sequences
        self._generator = torch.Generator().manual_seed(1)
        self._tokens = torch.randint(
            model.vocab_size, (self.sequences, self._scale.context), generator=self._generator
        ).tolist()
        self._same = RandomAdapters(model, [self._scale.rank])
        self._mixed = RandomAdapters(model, self._scale.mixed_ranks)
        model.allocate_kv(self.sequences * -(-self._scale.context // BLOCK), BLOCK)

    def prefill(self) -> None:
        """All but the last token of every sequence, so that attention reads keys that the model has made."""
        chunk = max(1, PREFILL_ROWS // self.sequences)
        last = self._scale.context - 1
        for start in range(0, last, chunk):
            views = [(tokens[: min(start + chunk, last)], start) for tokens in self._tokens]
            logits = self._model.forward(flat_inputs(views, BLOCK, (), "last", self._scale.context))
        if not bool(torch.isfinite(logits).all()):
            self._job.report.problem("prefill gave logits that are not finite")

    def fill(self, row: Row, rows: int, *, mixed: bool) -> None:
        """Measure all kinds of batches of so many rows; those of mixed ranks if asked."""
        base = self._cell(row, rows, "base", lambda: [])
        one = self._cell(row, rows, "1 adapter", lambda: self._same.take(1))
        rank = self._scale.rank
        each = self._cell(row, rows, f"one each, r={rank}", lambda: self._same.take(rows))
        low, high = min(self._scale.mixed_ranks), max(self._scale.mixed_ranks)
        if mixed:
            self._cell(row, rows, f"one each, r={low}–{high}", lambda: self._mixed.take(rows))
        if base and one:
            row["tax, 1 adapter"] = f"{one.device_ms / base.device_ms - 1:+.0%}"
        if base and each:
            row["tax, one each"] = f"{each.device_ms / base.device_ms - 1:+.0%}"
        if base:
            row["base on the clock"] = base.wall_ms

    def _cell(self, row: Row, rows: int, name: str, adapters: Callable[[], Sequence[Adapter]]) -> Took | None:
        spent = self._job.attempt(f"{rows} rows, {name}", lambda: self._step(rows, adapters()))
        row[name] = spent and spent.device_ms
        if self._job.bandwidth and spent:
            row[f"floor, {name}"] = self._bytes(rows, adapters()) / self._job.bandwidth * 1e3
        return spent

    def _step(self, rows: int, adapters: Sequence[Adapter]) -> Took:
        inputs = self.decode(rows, adapters)
        return took(
            partial(self._model.forward, inputs),
            self._model.device,
            warmups=self._scale.warmups,
            repeats=self._scale.repeats,
        )

    def decode(self, rows: int, adapters: Sequence[Adapter]) -> ModelInputs:
        """One more token of the first `rows` sequences; one adapter for all of them, one for each, or none."""
        share = rows // max(1, len(adapters))
        segments = [Segment(i * share, (i + 1) * share, 1.0, a.weights) for i, a in enumerate(adapters)]
        views = [(tokens, self._scale.context - 1) for tokens in self._tokens[:rows]]
        return flat_inputs(views, BLOCK, segments, "last", self._scale.context)

    def _bytes(self, rows: int, adapters: Sequence[Adapter]) -> int:
        """What a step has to read at least: NF4 weights, the head, keys and values, adapters; each once."""
        decoder = self._scale.steps
        head = decoder.vocab * decoder.hidden * self._model.dtype.itemsize
        cached = rows * self._scale.context * self._model.kv_bytes_per_token
        return self._model.facts.nf4_bytes + head + cached + sum(adapter.nbytes for adapter in adapters)

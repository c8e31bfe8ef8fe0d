"""Every kind of step once, before anything is served: what it compiles or loads then halts no stream later.

A kernel is compiled again for other constants, which follow from a step's number of rows (tiles, shares of K), from
its adapters' largest rank and whether they have biases or scales, and from whether sequences have one row or more. So
there is a pass for each of these; it runs on padding, over an empty table of adapters, and writes no key.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from loramux.model.causal_lm import CausalLM
from loramux.model.inputs import ModelInputs
from loramux.ops.backend import BoundSegments
from loramux.ops.device import device_errors
from loramux.ops.fused import CapturableBackend
from loramux.ops.greedy import select_greedy

# Larger ranks are computed in pieces, in the same kernels.
RANKS = (16, 32, 64)
# Few segments, and many.
SEGMENTS = (1, 64)


def warm_up(
    model: CausalLM,
    max_rows: int,
    max_tokens: int,
    *,
    compiling: Callable[[int, int], None] = lambda done, total: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run steps of up to `max_tokens` tokens, and of up to `max_rows` sequences with one, on a backend that compiles as
    it goes; others have nothing to do.

    compiling(done, total) is called after each kernel that is compiled ahead, progress(done, total) after each pass.
    Raises DeviceLost, and if the largest step does not fit, what is `out_of_memory` (ops.device).
    """
    backend = model.backend
    if not isinstance(backend, CapturableBackend):
        return
    rows = backend.row_counts(max_tokens)
    backend.precompile(rows, RANKS, compiling)
    passes = list(_passes(backend, rows, max_rows))
    with device_errors():
        for done, (starts, bind) in enumerate(passes, 1):
            logits = model.run_eagerly(_padding(starts), bind())
            select_greedy(logits.device)(logits)  # by the device that the sampler will ask with
            progress(done, len(passes))
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)


def sequence_counts(most: int) -> tuple[int, ...]:
    """The powers of two below `most`, at which the number of parts of a context changes, and `most` itself."""
    return (*(1 << i for i in range((most - 1).bit_length())), most)


def _passes(
    backend: CapturableBackend, rows: tuple[int, ...], max_rows: int
) -> Iterator[tuple[list[int], Callable[[], BoundSegments]]]:
    """Where the sequences of each pass begin, and what makes its table of adapters."""

    def nothing() -> BoundSegments:
        return backend.bind(())

    for sequences in sequence_counts(max_rows):
        yield list(range(sequences + 1)), nothing
    for count in rows:
        yield [0, count], nothing
        if count > 2:
            yield [0, count - 1, count], nothing
        for segments, rank, extras in itertools.product(SEGMENTS, RANKS, (False, True)):

            def adapters(
                segments: int = segments, count: int = count, rank: int = rank, extras: bool = extras
            ) -> BoundSegments:
                return backend.reserve_segments(segments, count, rank, extras=extras)

            yield [0, count], adapters


def _padding(starts: list[int]) -> ModelInputs:
    """Sequences that begin at `starts`, the last of which is the end: no slots, no context, logits of each last row."""
    rows, sequences = starts[-1], len(starts) - 1
    query_starts = torch.tensor(starts, dtype=torch.int32)
    return ModelInputs(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=torch.zeros(rows, dtype=torch.int64),
        slots=torch.full((rows,), -1),
        query_starts=query_starts,
        context_lens=torch.zeros(sequences, dtype=torch.int32),
        block_tables=torch.zeros(sequences, 1, dtype=torch.int32),
        logits_rows=query_starts[1:].long() - 1,
    )

"""The served base model: one NF4 model driven flat, with adapters by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramux.model.graphs import CudaRecorder, DecodeGraphs, Recorder, ladder
from loramux.model.inputs import ModelInputs
from loramux.model.modules import SiteLinear
from loramux.model.shortcut import Shortcut
from loramux.model.step import Step
from loramux.ops.backend import Backend, BoundSegments
from loramux.ops.compilations import compilations
from loramux.ops.fused import CapturableBackend
from loramux.ops.paged import LayerCache, PagedBatch
from loramux.ops.segment import Segment
from loramux.ops.site import Site


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a loaded model; for tables and GetModel. Sizes are in bytes."""

    name: str
    architecture: str
    parameters: int
    quantized_parameters: int
    nf4_bytes: int
    dense_bytes: int
    max_context: int
    vocab_size: int
    layers: int
    device: str
    dtype: str
    backend: str

    @property
    def bits_per_weight(self) -> float:
        """Average bits per quantized weight; 0 if none is quantized."""
        return 8 * self.nf4_bytes / self.quantized_parameters if self.quantized_parameters else 0.0


class CausalLM:
    """Runs flat batches. Owned by one thread; `forward` is not reentrant."""

    def __init__(
        self,
        name: str,
        skeleton: PreTrainedModel,
        linears: Sequence[SiteLinear],
        step: Step,
        eos_token_ids: frozenset[int],
        device: torch.device,
        dtype: torch.dtype,
        max_context: int,
    ) -> None:
        self._skeleton = skeleton
        self._step = step
        self._linears = tuple(linears)
        self.sites: tuple[Site, ...] = tuple(m.site for m in linears)
        self.device = device
        self.dtype = dtype
        self.eos_token_ids = eos_token_ids
        self.shortcut: Shortcut | None = None  # in place of the skeleton's own forward
        self.graphs: DecodeGraphs | None = None  # in place of the shortcut, in decode steps
        self.block_size = 0
        self.num_kv_blocks = 0
        self._compilations = compilations() if isinstance(step.backend, CapturableBackend) else None
        config = skeleton.config
        groups = {id(m.group): m.group for m in linears if m.group is not None}.values()
        dense = list(skeleton.parameters())
        quantized = sum(group.linear.numel for group in groups)
        merged = sum(group.linear.dense_numel for group in groups)
        biases = sum(m.out_features for m in linears if m.has_bias)
        self.facts = ModelFacts(
            name=name,
            architecture=type(skeleton).__name__,
            parameters=quantized + merged + biases + sum(p.numel() for p in dense),
            quantized_parameters=quantized,
            nf4_bytes=sum(group.linear.nbytes for group in groups),
            dense_bytes=sum(p.numel() * p.element_size() for p in dense)
            + sum(group.bias_bytes + group.linear.dense_nbytes for group in groups),
            max_context=max_context,
            vocab_size=config.vocab_size,
            layers=config.num_hidden_layers,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            backend=step.backend.name,
        )

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.facts.vocab_size

    @property
    def max_context(self) -> int:
        """Most tokens of one sequence, prompt and output together."""
        return self.facts.max_context

    @property
    def asynchronous(self) -> bool:
        """Whether `forward` returns when the work is launched, and waiting for its logits is waiting for the work."""
        return self.device.type == "cuda"

    @property
    def compilations(self) -> int:
        """Kernels that were made ready (compiled, or loaded from the disk) and graphs that were recorded so far."""
        kernels = 0 if self._compilations is None else self._compilations.count
        return kernels + (0 if self.graphs is None else self.graphs.captures)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes over all layers. Known once the self-test has run."""
        return sum(
            t.shape[1] * t.shape[3] * t.element_size()
            for cache in self._step.caches.values()
            for t in (cache.keys, cache.values)
        )

    def dequantize(self, site: Site) -> Tensor:
        """A fresh float32 [out_features, in_features] of a site's weight, on the model's device. Any thread may ask."""
        return self._linears[site.index].dequantize()

    def dense_weights(self) -> dict[str, Tensor]:
        """The weights that no adapter changes, by their names in the Hugging Face model. Not to be written to."""
        return {name: parameter.data for name, parameter in self._skeleton.named_parameters(remove_duplicate=False)}

    def allocate_kv(self, num_blocks: int, block_size: int) -> None:
        """Replace the cache by one of `num_blocks` blocks of `block_size` tokens. Graphs of the old one are gone."""
        self.graphs = None
        shapes = {i: (c.keys.shape[1], c.keys.shape[3], c.values.shape[3]) for i, c in self._step.caches.items()}
        self._step.caches.clear()
        for layer, (heads, key_dim, value_dim) in sorted(shapes.items()):
            self._step.caches[layer] = LayerCache.allocate(
                num_blocks, block_size, heads, key_dim, value_dim, self.dtype, self.device
            )
        self.num_kv_blocks, self.block_size = num_blocks, block_size

    @property
    def can_capture(self) -> bool:
        """Whether decode steps can be CUDA graphs: on a GPU, of a model with a shortcut, if the backend allows it."""
        return (
            self.device.type == "cuda"
            and self.shortcut is not None
            and isinstance(self._step.backend, CapturableBackend)
        )

    def capture_decode_steps(
        self,
        max_rows: int,
        recorder: Recorder | None = None,
        *,
        max_mix: int = 1,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Record decode steps of at most `max_rows` sequences, any of which may mix `max_mix` adapters, and replay
        them from now on; call it after `allocate_kv`. `recorder` is another one than CUDA's, for tests;
        progress(done, total) is called after each graph. Raises DeviceLost."""
        assert self.shortcut is not None
        longest = min(self.max_context, self.num_kv_blocks * self.block_size)
        self.graphs = DecodeGraphs(
            self.shortcut,
            self._step,
            recorder or CudaRecorder(self.device),
            self.device,
            rungs=ladder(max_rows, longest, max_mix),
            block_size=self.block_size,
        )
        self.graphs.capture(progress)

    @torch.inference_mode()
    def forward(self, inputs: ModelInputs) -> Tensor:
        """Logits [R, V] in the compute dtype for `inputs.logits_rows`, good until the next call; writes the rows'
        keys and values."""
        if self.graphs is not None and (replayed := self.graphs.run(inputs)) is not None:
            return replayed
        return self.run_eagerly(inputs, self._step.backend.bind(inputs.segments))

    @torch.inference_mode()
    def run_eagerly(self, inputs: ModelInputs, segments: BoundSegments) -> Tensor:
        """`forward` without graphs, and with `segments` in the place of those of `inputs`."""
        ids, positions = inputs.token_ids.to(self.device), inputs.positions.to(self.device)
        rows = inputs.logits_rows.to(self.device)
        with self._running(inputs, segments):
            if self.shortcut is not None:
                return self.shortcut.run(ids, positions, rows)
            output = self._skeleton(
                input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, logits_to_keep=rows
            )
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def _running(self, inputs: ModelInputs, segments: BoundSegments) -> Iterator[None]:
        step = self._step
        step.segments = segments
        step.batch = PagedBatch(
            slots=inputs.slots.to(self.device),
            query_starts=inputs.query_starts.to(self.device),
            context_lens=inputs.context_lens.to(self.device),
            block_tables=inputs.block_tables.to(self.device),
            starts=tuple(inputs.query_starts.tolist()),
            contexts=tuple(inputs.context_lens.tolist()),
        )
        try:
            yield
        finally:
            # Adapters must not outlive their leases in here.
            step.segments, step.batch = step.backend.bind(()), None

    @property
    def attention_calls(self) -> dict[int, int]:
        """How often each layer's attention has run; the self-test reads it."""
        return self._step.attention_calls

    @property
    def backend(self) -> Backend:
        """The operations in use."""
        return self._step.backend


def flat_inputs(
    sequences: Sequence[tuple[Sequence[int], int]],
    block_size: int,
    segments: Sequence[Segment] = (),
    logits: str = "all",
    reserve: int = 0,
) -> ModelInputs:
    """A batch of whole sequences without an engine, for self-tests and oracles.

    sequences: (all token ids so far, how many of them are cached already), each with its own run of blocks of
    `block_size` tokens, in order. `logits`: "all" rows or only each sequence's "last". `reserve`: tokens that each
    sequence has blocks for, so that it keeps its place while it grows.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, contexts = [0], []
    tables: list[list[int]] = []
    rows: list[int] = []
    next_block = 0
    for tokens, cached in sequences:
        blocks = -(-max(len(tokens), reserve) // block_size)
        table = list(range(next_block, next_block + blocks))
        next_block += blocks
        for p in range(cached, len(tokens)):
            ids.append(tokens[p])
            positions.append(p)
            slots.append(table[p // block_size] * block_size + p % block_size)
        starts.append(len(ids))
        contexts.append(len(tokens))
        tables.append(table)
        rows += [len(ids) - 1] if logits == "last" else range(starts[-2], len(ids))
    width = max(map(len, tables))
    return ModelInputs(
        token_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
        logits_rows=torch.tensor(rows),
        segments=tuple(segments),
    )

"""Loading a base model, start to end: source → skeleton → sites → weights → self-test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from loramux.errors import StartupError, UnsupportedModel
from loramux.model.attention import NAME as ATTENTION
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.fused import fuse
from loramux.model.refusal import refuse_by_name
from loramux.model.selftest import BLOCK, driven_flat, prove_flat
from loramux.model.shortcut import Shortcut
from loramux.model.skeleton import build_skeleton
from loramux.model.sources import TensorSource, open_source
from loramux.model.step import Step
from loramux.model.surgery import connect, place_sites
from loramux.model.tokenizer import Tokenizer
from loramux.model.weights import SiteChange, StoredWeights, WeightReader, buffers, fill, parameters, untie
from loramux.ops.backend import Backend
from loramux.ops.paged import LayerCache
from loramux.ops.select import select_backend
from loramux.ops.site import Site

Progress = Callable[[int, int], None]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to serve, its tokenizer if the source has one, and what was merged into it, if anything was.

    `place` opens the same source again (model.sources.TensorSource).
    """

    model: CausalLM
    tokenizer: Tokenizer | None
    place: str
    merged: SiteChange | None = None


@refuse_by_name
def load_model(
    source: str | TensorSource,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_context: int | None = None,
    backend: Backend | None = None,
    batch_invariant: bool = False,
    progress: Progress | None = None,
    compiling: Progress | None = None,
    revision: str | None = None,
    merging: Callable[[Sequence[Site], Mapping[str, torch.Tensor]], SiteChange] | None = None,
) -> LoadedModel:
    """Load `source` (see `sources.open_source`) with its decoder's linear layers in NF4 (those of a merged folder stay
    dense: `sources.TensorSource.merged`).

    device: "auto", "cpu" or "cuda"; dtype: "auto" (bf16), "bf16", "fp16", "fp32": what activations, KV cache and
    adapters are computed in. max_context lowers the model's own limit and never raises it. batch_invariant refuses
    operations whose results depend on the rest of the batch. progress(done, total) is called after each tensor,
    compiling(done, total) after each file if native operations are compiled. merging(sites, dense weights) gives
    what to merge into the layers; those that it changes are dense. Raises StartupError (bad source or device, too
    little memory) or UnsupportedModel (cannot be served), with the reason; InvalidAdapter for what cannot be merged.
    """
    place = pick_device(device)
    compute = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
    opened = open_source(source, revision=revision) if isinstance(source, str) else source
    skeleton = build_skeleton(opened.config, compute, ATTENTION)
    linears = place_sites(skeleton)
    operations = backend or select_backend(place, compute, compiling, batch_invariant=batch_invariant)
    if batch_invariant and not operations.batch_invariant:
        raise StartupError(
            f"--batch-invariant: {operations.name} on {place.type} in {dtype} sums in an order that depends on the "
            "batch; serve in bf16 or fp16 on a GPU with Triton, or in bf16 on a CPU with the native operations"
        )
    reader = WeightReader(opened, skeleton)
    untie(skeleton, reader)
    total = len(linears) + len(parameters(skeleton))
    stored = StoredWeights(reader, skeleton, compute)
    change = None if merging is None else merging([linear.site for linear in linears], stored)
    done = 0
    try:
        for done, _ in enumerate(fill(skeleton, linears, reader, compute, place, change), 1):
            if progress is not None:
                progress(done, total)
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"{opened.name} does not fit on {place}: its memory was full after {done} of {total} tensors "
            f"({_memory(place)}); take a smaller model, a larger device, or give up what else runs there"
        ) from error

    def make_cache(heads: int, key_dim: int, value_dim: int) -> LayerCache:
        # Only until the KV cache proper is allocated: room for the self-test's first pass.
        return LayerCache.allocate(8, BLOCK, heads, key_dim, value_dim, compute, place)

    reader.tell_unused()
    step = Step(operations, make_cache)
    connect(skeleton, linears, step)
    model = CausalLM(
        opened.name,
        skeleton,
        linears,
        step,
        _eos_token_ids(opened),
        place,
        compute,
        context_limit(opened.name, opened.config, max_context),
    )
    with driven_flat(model):
        fuse(skeleton, step, probe=lambda: model.forward(flat_inputs([([0, 1], 0)], BLOCK)))
        model.shortcut = Shortcut.find(skeleton, model.max_context)
        prove_flat(model)
    tokenizer = None if opened.tokenizer is None else Tokenizer(opened.tokenizer)
    return LoadedModel(model, tokenizer, opened.place, change)


def dequantized_model(
    source: str | TensorSource = "smollm2", dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """An ordinary transformers model on the CPU with the same NF4 weights dequantized: the oracle for tests, and the
    frozen base to train adapters on."""
    opened = open_source(source) if isinstance(source, str) else source
    dense = build_skeleton(opened.config, dtype, attention)
    # Sites are placed in a second skeleton only to learn which layers are quantized and how.
    linears = place_sites(build_skeleton(opened.config, dtype, "eager"))
    reader = WeightReader(opened, dense)
    untie(dense, reader)
    state: dict[str, torch.Tensor] = {}
    for linear in linears:
        site = linear.site
        weight = reader.nf4(
            f"{site.name}.weight", (site.out_features, site.in_features), torch.device("cpu"), site.transposed
        ).dequantize(dtype)
        state[f"{site.name}.weight"] = weight.T.contiguous() if site.transposed else weight
    for names, _ in parameters(dense):
        if names[0] not in state:
            key = next((n for n in names if reader.find(n) is not None), names[0])
            state[names[0]] = reader.dense(key).to(dtype).clone()
    state |= {name: reader.dense(name).to(buffer.dtype).clone() for name, buffer in buffers(dense, reader)}
    dense.load_state_dict(state, strict=False, assign=True)
    dense.tie_weights()
    if opened.generation_config is not None:
        dense.generation_config = opened.generation_config
    return dense.requires_grad_(False)


def write_dense(source: str, folder: Path) -> None:
    """Write `dequantized_model(source)` in bf16, with its tokenizer, as an ordinary Hugging Face folder."""
    opened = open_source(source)
    dequantized_model(opened, torch.bfloat16).save_pretrained(folder)
    tokenizer: Any = opened.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def pick_device(device: str) -> torch.device:
    """ "auto" prefers a GPU. Raises StartupError if the asked-for device is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise StartupError(
            "--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    return torch.device(device)


def _memory(device: torch.device) -> str:
    free, whole = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_allocated(device)
    return f"{ours / 2**30:.1f} GiB hold the model so far, {free / 2**30:.1f} of {whole / 2**30:.1f} GiB are free"


def _eos_token_ids(source: TensorSource) -> frozenset[int]:
    found: set[int | None] = set()
    for holder in (source.generation_config, source.config):
        value = getattr(holder, "eos_token_id", None)
        found |= set(value) if isinstance(value, list) else {value}
    found.add(getattr(source.tokenizer, "eos_token_id", None))
    return frozenset(i for i in found if i is not None)


def context_limit(name: str, config: PretrainedConfig, wanted: int | None) -> int:
    """Most tokens of one sequence: what the model was made for, or `wanted` if that is less. Raises UnsupportedModel if
    nothing says it."""
    given = (getattr(config, key, None) for key in ("max_position_embeddings", "seq_length", "n_positions"))
    own = next((n for n in given if isinstance(n, int) and n > 0), None)
    if own is None:
        if wanted is None:
            raise UnsupportedModel(f"{name}: its config names no context length; give --max-context")
        return wanted
    return int(own) if wanted is None else min(wanted, int(own))

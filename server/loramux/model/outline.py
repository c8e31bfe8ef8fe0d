"""A model as it would be loaded on a GPU, told from its config alone: shapes on the meta device, without weights.

It is built and run by what builds and runs a loaded model, so that its sizes are those that the server finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from loramux.errors import StartupError
from loramux.merge_report import MERGE_REPORT
from loramux.model.attention import NAME as ATTENTION
from loramux.model.causal_lm import CausalLM, ModelFacts, flat_inputs
from loramux.model.embedded import EMBEDDED, ensure_embedded
from loramux.model.loading import DTYPES, context_limit
from loramux.model.refusal import refuse_by_name
from loramux.model.selftest import BLOCK, driven_flat, require_paged_attention
from loramux.model.shortcut import Shortcut
from loramux.model.skeleton import build_skeleton
from loramux.model.sources import convert_gguf, read_config
from loramux.model.step import Step
from loramux.model.surgery import connect, place_sites
from loramux.model.towers import language_config
from loramux.ops.backend import Backend, LinearPart, SiteSegment
from loramux.ops.dense import DenseWeight
from loramux.ops.nf4 import NF4Weight
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.select import takes_kernels
from loramux.ops.site import Site

_META = torch.device("meta")
_CAPABILITY = (8, 0)  # of the GPU that is planned for


@dataclass(frozen=True, slots=True)
class Outline:
    """A model on a GPU that takes the Triton kernels, as far as memory is planned by it (kv_capacity.PlannedModel).

    facts, sites, dtype, kv_bytes_per_token, can_capture  see CausalLM
    """

    facts: ModelFacts
    sites: tuple[Site, ...]
    dtype: torch.dtype
    kv_bytes_per_token: int
    can_capture: bool

    @property
    def device(self) -> torch.device:
        """A GPU."""
        return torch.device("cuda")

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.facts.vocab_size

    @property
    def max_context(self) -> int:
        """Most tokens of one sequence, prompt and output together."""
        return self.facts.max_context


@refuse_by_name
def outline(source: str, *, dtype: str = "auto", max_context: int | None = None) -> Outline:
    """The outline of what `source` describes: a config.json, a folder with one, or the name of an embedded model, which
    is fetched if it was never served; see `loading.load_model`.

    Embedding and head are taken to be one weight where the config says so: whether a checkpoint holds two is not
    looked at. Raises StartupError for a file that cannot be read, UnsupportedModel for a model that is not served.
    """
    compute = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
    file = _config_file(source)
    config = read_config(file, source)
    merged = (file.parent / MERGE_REPORT).is_file()
    double = _double_quantized(config)
    config = language_config(config)
    skeleton = build_skeleton(config, compute, ATTENTION)
    linears = place_sites(skeleton)
    for linear in linears:
        shape = linear.site.out_features, linear.site.in_features
        weight: NF4Weight | DenseWeight
        if merged:
            weight = DenseWeight(torch.empty(shape, dtype=compute, device=_META))
        else:
            weight = NF4Weight.empty(shape, _META, double=double)
        bias = torch.empty(linear.out_features, dtype=compute, device=_META) if linear.has_bias else None
        linear.part = LinearPart(weight, bias)

    def make_cache(heads: int, key_dim: int, value_dim: int) -> LayerCache:
        return LayerCache.allocate(1, BLOCK, heads, key_dim, value_dim, compute, _META)

    step = Step(_Shapes(), make_cache)
    connect(skeleton, linears, step)
    nn.Module.to(skeleton, _META)  # its buffers, too
    limit = context_limit(source, config, max_context)
    model = CausalLM(source, skeleton, linears, step, frozenset(), _META, compute, limit)
    with driven_flat(model):
        model.forward(flat_inputs([([0, 1], 0)], BLOCK))
        require_paged_attention(model)
    capture = Shortcut.knows(skeleton) and takes_kernels(_CAPABILITY, compute)
    return Outline(model.facts, model.sites, compute, model.kv_bytes_per_token, capture)


class _Shapes(Backend):
    """Operations whose results have a shape and no values."""

    name = "shapes"

    def linear(self, x: Tensor, parts: Sequence[LinearPart], segments: Sequence[SiteSegment]) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape[0], part.weight.shape[0]) for part in parts)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: PagedBatch, shape: AttentionShape
    ) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _config_file(source: str) -> Path:
    """Raises StartupError if there is none."""
    if source in EMBEDDED:
        return ensure_embedded(source, convert_gguf) / "config.json"
    path = Path(source).expanduser()
    try:
        file = path / "config.json" if path.is_dir() else path
        if file.is_file():
            return file
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise StartupError(f"cannot look at {source}: {error}") from error
    raise StartupError(
        f"{source}: there is no such file, or no config.json in it; give a model's folder or config.json"
    )


def _double_quantized(config: PretrainedConfig) -> bool:
    """Whether scales of NF4 blocks are quantized, too: so it is when loramux quantizes."""
    stored = getattr(config, "quantization_config", None)
    return bool(stored.get("bnb_4bit_use_double_quant", False)) if isinstance(stored, dict) and stored else True

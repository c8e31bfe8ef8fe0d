"""Random models and adapters of any size, made on the device in seconds, without a file; and how calls are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from loramux.lora.layout import Factors, lay_out
from loramux.model.causal_lm import CausalLM
from loramux.model.loading import load_model
from loramux.model.sources import TensorSource
from loramux.ops.segment import AdapterWeights, LoraWeights
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForCausalLM

STRENGTH = 0.1  # how large an adapter's branch is beside its input


def milliseconds(call: Callable[[], object], seconds: float = 0.2) -> float:
    """Median of calls one after another, in about so many seconds after a warm-up. The device is waited for once a
    block of calls, so of what only launches it is the device's time."""
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=seconds).median * 1e3


def random_model(config: Mapping[str, Any], device: str) -> Any:
    """transformers' own model of this config.json, in bf16, of unit size through every layer."""
    filled = AutoConfig.for_model(**config, initializer_range=config["hidden_size"] ** -0.5)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(filled, dtype=torch.bfloat16)
    model.eval().requires_grad_(False)
    return model


class ModelSource(TensorSource):
    """The checkpoint that a transformers model would make, its tensors where they are."""

    generation_config = None
    tokenizer = None

    def __init__(self, model: Any) -> None:
        self.name = self.place = "random"
        self.config = model.config
        self._tensors: dict[str, Tensor] = model.state_dict()

    def keys(self) -> Iterable[str]:
        return self._tensors

    def get(self, key: str) -> Tensor:
        return self._tensors[key]


def served_model(config: Mapping[str, Any], device: str, *, invariant: bool = False) -> CausalLM:
    """A random model as the server has it, through the server's own loading."""
    return load_model(ModelSource(random_model(config, device)), device=device, batch_invariant=invariant).model


def random_adapter(model: CausalLM, rank: int) -> AdapterWeights:
    """An adapter of all sites, laid out as one that was loaded; made on the model's device."""
    layout = lay_out([Factors(site, rank) for site in model.sites], model.dtype.itemsize)
    buffer = torch.empty(layout.elements, dtype=model.dtype, device=model.device)
    # Of independent factors this large: a branch of about STRENGTH times its input.
    buffer.normal_(std=(STRENGTH**2 / (rank * model.sites[0].in_features)) ** 0.25)
    views = {}
    for site in model.sites:
        at, k, n = layout.offsets[site.index], site.in_features, site.out_features
        a, b = buffer[at.a : at.a + rank * k], buffer[at.b : at.b + n * rank]
        views[site.index] = LoraWeights(a.view(rank, k), b.view(n, rank))
    offsets = torch.tensor([(at.a, at.b, -1, -1) for at in layout.offsets.values()])
    return AdapterWeights(buffer, offsets, torch.full((len(model.sites),), rank, dtype=torch.int32), views)

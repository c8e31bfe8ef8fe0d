"""transformers' modeling code without weights: parameters on the meta device, buffers real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from loramux.errors import UnsupportedModel
from loramux.model.refusal import refusing


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Parameters registered inside take no memory; buffers (rotary frequencies) are computed as usual."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is on meta already is shared on purpose (tied embeddings): keep its identity.
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The causal language model that `config` describes, in eval mode.

    Raises UnsupportedModel if transformers has no such model or cannot use `attention` in it.
    """
    name = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name}: encoder-decoder models are not served; loramux drives decoders only")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    for kind in ("longrope", "dynamic"):
        if kind in kinds:
            raise UnsupportedModel(
                f"{name}: rope type {kind!r} looks at the longest position of the whole batch, so a request's answer "
                "would depend on its neighbours; use a variant of this model with a plain, linear, llama3 or yarn rope"
            )
    # A quantization_config would make transformers put its own quantized layers in.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with refusing(f"{name}: transformers cannot build this model"), meta_parameters():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except UnsupportedModel as error:
        cause = error.__cause__
        if isinstance(cause, KeyError) and cause.args == (attention,):
            raise UnsupportedModel(
                f"{name}: its modeling code picks attention from a list of its own and ignores transformers' "
                "AttentionInterface, so its attention cannot be paged"
            ) from cause
        raise
    skeleton: PreTrainedModel = model.eval()
    return skeleton


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its module path, e.g. "model.layers". Raises UnsupportedModel without one."""
    depth = getattr(model.config, "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return path, module
    raise UnsupportedModel(f"{model.config.model_type}: found no list of {depth} decoder layers in the model")

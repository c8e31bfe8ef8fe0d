"""Decoder layers of the usual shape in one call, where the backend has the parts (`ops.fused.FusingBackend`).

Layers are replaced only if their class is one whose forward is known to be this: norm, q/k/v, rotary attention, o,
residual and norm, silu(gate)·up, down, residual. Everything else keeps running transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from loramux.model.modules import LinearGroup, SiteLinear
from loramux.model.skeleton import decoder_layers
from loramux.model.step import Step
from loramux.ops.fused import FusedLinear, FusingBackend, LayerOperations

_LAYERS = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"})
_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"})


class FusedNorm(nn.Module):
    """Llama's RMSNorm."""

    def __init__(self, norm: nn.Module, backend: FusingBackend) -> None:
        super().__init__()
        self.weight = norm.weight
        self._epsilon = float(norm.variance_epsilon)  # type: ignore[arg-type]
        self._backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] → the same."""
        assert isinstance(self.weight, Tensor)
        return self._backend.norm(x.reshape(-1, x.shape[-1]), None, self.weight, self._epsilon)[1].view(x.shape)


class FusedDecoder(nn.Module):
    """All decoder layers of a model, Llama-shaped. Holds the originals as `layers`, which keep the norms' weights."""

    def __init__(
        self, layers: nn.ModuleList, step: Step, operations: list[LayerOperations], backend: FusingBackend
    ) -> None:
        super().__init__()
        self.layers = layers
        first: Any = layers[0]
        # Some models choose a layer's mask by this; there are no masks here.
        self.attention_type = getattr(first, "attention_type", "full_attention")
        self._step = step
        self._indices: list[int] = [layer.self_attn.layer_idx for layer in layers]  # type: ignore[union-attr, misc]
        attention = first.self_attn
        self._dim: int = attention.head_dim
        self._kv_heads = attention.k_proj.out_features // self._dim
        heads = attention.q_proj.out_features // self._dim
        self._decoder = backend.decoder(operations, heads, self._kv_heads, self._dim)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **_: Any
    ) -> Tensor:
        """[1, T, features] → the same."""
        step = self._step
        assert position_embeddings is not None
        assert step.batch is not None
        caches = []
        for index in self._indices:
            cache = step.caches.get(index)
            if cache is None:
                cache = step.caches[index] = step.make_cache(self._kv_heads, self._dim, self._dim)
            caches.append(cache)
            step.attention_calls[index] = step.attention_calls.get(index, 0) + 1
        cosines, sines = position_embeddings
        y = self._decoder.run(hidden_states[0], cosines[0], sines[0], caches, step.batch, step.segments)
        return y.unsqueeze(0)


class FusedHead(nn.Module):
    """A dense lm_head that no adapter changes."""

    def __init__(self, head: nn.Linear, step: Step, linear: FusedLinear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self._step = step
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """[1, R, features] → [1, R, vocabulary]; R may be 0, in a step of prompt chunks only."""
        y = self._linear.run(x.reshape(-1, x.shape[-1]), self._step.segments)
        return y.view(*x.shape[:-1], self._linear.width)


def fuse(model: PreTrainedModel, step: Step, probe: Callable[[], object]) -> bool:
    """Replace what is known to be replaceable, if the backend has the parts; returns whether the layers are one call.

    A model of which some layers are of another shape keeps all of them. `probe` runs the model as it is, once, to
    learn what each layer's attention asks for (its window, its scaling): some layers keep that in attributes, some in
    the configuration.
    """
    backend = step.backend
    if not isinstance(backend, FusingBackend):
        return False
    path, layers = decoder_layers(model)
    operations: list[LayerOperations] = []
    if all(_llama_shaped(layer, backend.widest_head) for layer in layers):
        probe()
        found = [_operations(layer, step) for layer in layers]
        operations = [operation for operation in found if operation is not None]
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    fused = len(operations) == len(layers)
    if fused:
        setattr(holder, name, nn.ModuleList([FusedDecoder(layers, step, operations, backend)]))
    for child_name, child in list(holder.named_children()):
        if type(child).__name__ in _NORMS:
            setattr(holder, child_name, FusedNorm(child, backend))
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        linear = backend.prepare_dense(head.weight.data, None if head.bias is None else head.bias.data)
        if linear is not None:
            model.set_output_embeddings(FusedHead(head, step, linear))
    return fused


def _llama_shaped(layer: Any, widest_head: int | None) -> bool:
    """Whether the layer's class is known, and this one is built as that class usually is, with heads that fit."""
    if type(layer).__name__ not in _LAYERS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation")
        and all(type(norm).__name__ in _NORMS for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        # Odd multiples would need padding between heads, which the fused layout has not.
        and attention.q_proj.out_features % attention.head_dim == 0
        and attention.v_proj.out_features == attention.k_proj.out_features
        and (widest_head is None or attention.head_dim <= widest_head)
    )


def _operations(layer: Any, step: Step) -> LayerOperations | None:
    """The operations of a Llama-shaped layer that has run once; None if one of them is not fused."""
    attention, mlp, norms = layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm)
    qkv, o = _fused(attention.q_proj, 3), _fused(attention.o_proj)
    gate_up, down = _fused(mlp.gate_proj, 2), _fused(mlp.down_proj)
    shape = step.attention_shapes[attention.layer_idx]
    if qkv is None or o is None or gate_up is None or down is None:
        return None
    if shape.softcap is not None or shape.sinks is not None:
        return None
    return LayerOperations(
        qkv,
        o,
        gate_up,
        down,
        norms[0].weight,
        float(norms[0].variance_epsilon),
        norms[1].weight,
        float(norms[1].variance_epsilon),
        shape,
    )


def _fused(module: object, members: int = 1) -> FusedLinear | None:
    """The operation of a site's group, if it is one and has that many members."""
    if not isinstance(module, SiteLinear) or not isinstance(module.group, LinearGroup):
        return None
    linear = module.group.linear
    return linear if isinstance(linear, FusedLinear) and linear.parts == members else None

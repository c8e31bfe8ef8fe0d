"""Decoder layers of the usual shape in a few calls, where the backend offers fused operations.

A layer is replaced only if its class is one whose forward is known to be this: norm, q/k/v, rotary attention, o,
residual and norm, silu(gate)·up, down, residual. Everything else keeps running transformers' own code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from loramux.model.modules import LinearGroup, SiteLinear
from loramux.model.skeleton import decoder_layers
from loramux.model.step import Step
from loramux.ops.backend import FusedOperations
from loramux.ops.cpu.backend import NativeBackend, NativeLinear
from loramux.ops.paged import AttentionShape

_LAYERS = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"})
_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"})


class FusedNorm(nn.Module):
    """Llama's RMSNorm."""

    def __init__(self, norm: nn.Module, backend: FusedOperations) -> None:
        super().__init__()
        self.weight = norm.weight
        self._epsilon = float(norm.variance_epsilon)  # type: ignore[arg-type]
        self._backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] → the same."""
        assert isinstance(self.weight, Tensor)
        return self._backend.norm(x.reshape(-1, x.shape[-1]), None, self.weight, self._epsilon)[1].view(x.shape)


class FusedLayer(nn.Module):
    """A Llama-shaped decoder layer. Holds the original as `layer`, which keeps its weights."""

    def __init__(
        self, layer: Any, step: Step, backend: NativeBackend, qkv: NativeLinear, gate_up: NativeLinear
    ) -> None:
        super().__init__()
        self.layer = layer
        attention = layer.self_attn
        self._step = step
        self._backend = backend
        self._qkv, self._gate_up = qkv, gate_up
        self._o, self._down = _native(attention.o_proj), _native(layer.mlp.down_proj)
        self._index: int = attention.layer_idx
        self._dim: int = attention.head_dim
        self._heads = attention.q_proj.out_features // self._dim
        self._kv_heads = attention.k_proj.out_features // self._dim
        self._shape = AttentionShape(attention.scaling, getattr(attention, "sliding_window", None))
        self._norms = layer.input_layernorm, layer.post_attention_layernorm

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **_: Any
    ) -> Tensor:
        """[1, T, features] → the same."""
        assert position_embeddings is not None
        step, backend, dim = self._step, self._backend, self._dim
        first, second = self._norms
        x = hidden_states[0]
        _total, y = backend.norm(x, None, first.weight, first.variance_epsilon)
        assert self._qkv is not None
        assert self._o is not None
        assert self._down is not None
        qkv = self._qkv.run(y, step.segments).view(x.shape[0], -1, dim)
        heads, both = self._heads, self._heads + self._kv_heads
        q, k, v = qkv[:, :heads], qkv[:, heads:both], qkv[:, both:]
        cache = step.caches.get(self._index)
        if cache is None:
            cache = step.caches[self._index] = step.make_cache(self._kv_heads, dim, dim)
        assert step.batch is not None
        step.attention_calls[self._index] = step.attention_calls.get(self._index, 0) + 1
        cosines, sines = position_embeddings
        attended = backend.rotary_attention(q, k, v, cosines[0], sines[0], cache, step.batch, self._shape)
        o = self._o.run(attended.view(x.shape[0], -1), step.segments)
        x, y = backend.norm(o, x, second.weight, second.variance_epsilon)
        gated = backend.gate(self._gate_up.run(y, step.segments))
        return (x + self._down.run(gated, step.segments)).unsqueeze(0)


class FusedHead(nn.Module):
    """A dense lm_head that no adapter changes."""

    def __init__(self, head: nn.Linear, step: Step, linear: NativeLinear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self._step = step
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """[1, R, features] → [1, R, vocabulary]."""
        return self._linear.run(x.reshape(-1, x.shape[-1]), self._step.segments).view(*x.shape[:-1], -1)


def fuse(model: PreTrainedModel, step: Step) -> int:
    """Replace what is known to be replaceable, if the backend is native; returns the number of layers replaced."""
    backend = step.backend
    if not isinstance(backend, NativeBackend):
        return 0
    path, layers = decoder_layers(model)
    replaced = 0
    for index, layer in enumerate(layers):
        qkv, gate_up = _llama_shaped(layer)
        if qkv is not None and gate_up is not None:
            layers[index] = FusedLayer(layer, step, backend, qkv, gate_up)
            replaced += 1
    parent, _, _ = path.rpartition(".")
    holder = model.get_submodule(parent)
    for name, child in list(holder.named_children()):
        if type(child).__name__ in _NORMS:
            setattr(holder, name, FusedNorm(child, backend))
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        linear = backend.prepare_dense(head.weight.data, None if head.bias is None else head.bias.data)
        if linear is not None:
            model.set_output_embeddings(FusedHead(head, step, linear))
    return replaced


def _llama_shaped(layer: nn.Module) -> tuple[NativeLinear | None, NativeLinear | None]:
    """The layer's q/k/v and gate/up operations, or None where it is not of the known shape."""
    if type(layer).__name__ not in _LAYERS:
        return None, None
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, nn.Module)
    assert isinstance(mlp, nn.Module)
    known = (
        isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation",
        type(layer.input_layernorm).__name__ in _NORMS,
        type(layer.post_attention_layernorm).__name__ in _NORMS,
        _native(attention.o_proj) is not None,
        _native(mlp.down_proj) is not None,
        # Odd multiples would need padding between heads, which the fused layout has not.
        attention.q_proj.out_features % attention.head_dim == 0,  # type: ignore[union-attr, operator]
    )
    if not all(known):
        return None, None
    return _native(attention.q_proj, 3), _native(mlp.gate_proj, 2)


def _native(module: object, members: int = 1) -> NativeLinear | None:
    """The native operation of a site's group, if it is one and has that many members."""
    if not isinstance(module, SiteLinear) or not isinstance(module.group, LinearGroup):
        return None
    linear = module.group.linear
    return linear if isinstance(linear, NativeLinear) and linear.parts == members else None

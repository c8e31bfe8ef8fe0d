"""transformers' attention, redirected into the paged cache.

Registered in `AttentionInterface` and deliberately not in `AttentionMaskInterface`: transformers then builds no mask
at all, and causality, windows and sequence borders are the backend's work.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from loramux.model.step import Step
from loramux.ops.paged import AttentionShape

NAME = "loramux"


class FlatAttentionError(Exception):
    """The modeling code asked for something that flat, paged attention does not do; the text says what."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, H_kv, T, ·] → ([1, T, H, D_v], None), over the step's paged batch."""
    step = module.loramux_step
    assert isinstance(step, Step)
    if attention_mask is not None or kwargs.get("is_causal") is False:
        raise FlatAttentionError("its attention builds a mask of its own")
    if kwargs.get("position_bias") is not None or kwargs.get("alibi") is not None:
        raise FlatAttentionError("its attention adds a bias to the scores")
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads:
        raise FlatAttentionError(f"its {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    layer = module.layer_idx
    assert isinstance(layer, int)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    cache = step.caches.get(layer)
    if cache is None:
        cache = step.caches[layer] = step.make_cache(k.shape[1], k.shape[2], v.shape[2])
    assert step.batch is not None
    step.attention_calls[layer] = step.attention_calls.get(layer, 0) + 1
    shape = step.attention_shapes[layer] = AttentionShape(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    out = step.backend.attention(q, k, v, cache, step.batch, shape)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, paged_attention)

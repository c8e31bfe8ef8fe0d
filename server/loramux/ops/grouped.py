"""Torch and bitsandbytes, on any device: dequantize a weight, one matmul; two matmuls a segment.

Rows of one adapter are adjacent, so an adapter's factors are used in place by ordinary matmuls: nothing is gathered
per token and nothing is padded to a common rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from loramux.ops.backend import Backend, LinearPart, SiteSegment
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch


class GroupedBackend(Backend):
    """Computes in x's dtype with float32 accumulation inside each matmul."""

    name = "torch + bitsandbytes"

    def linear(self, x: Tensor, parts: Sequence[LinearPart], segments: Sequence[SiteSegment]) -> tuple[Tensor, ...]:
        outputs = tuple(F.linear(x, part.weight.dequantize(x.dtype), part.bias) for part in parts)
        for segment in segments:
            rows = x[segment.start : segment.stop]
            for y, part, lora in zip(outputs, parts, segment.parts, strict=True):
                if lora is None:
                    continue
                target = y[segment.start : segment.stop]
                target.addmm_(rows @ lora.a.T, lora.b.T, alpha=segment.weight)
                if lora.bias is not None:
                    target.add_(lora.bias, alpha=segment.weight)
                if lora.scale is not None:
                    bias = 0.0 if part.bias is None else part.bias.float()
                    target.copy_((target.float() - bias) * lora.scale + bias)
        return outputs

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: PagedBatch, shape: AttentionShape
    ) -> Tensor:
        cache.write(batch.slots, k, v)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for s, context in enumerate(batch.contexts):
            start, stop = batch.starts[s], batch.starts[s + 1]
            keys, values = cache.read(batch.block_tables[s], context)
            out[start:stop] = _attend(q[start:stop], keys, values, shape)
        return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, shape: AttentionShape) -> Tensor:
    """One sequence: q [Q, H, D] are the last Q of the L positions in keys and values [L, H_kv, ·]."""
    rows, context = q.shape[0], keys.shape[0]
    if rows == 1 and shape.sliding_window is not None and context > shape.sliding_window:
        keys, values = keys[-shape.sliding_window :], values[-shape.sliding_window :]
        context = keys.shape[0]
    mask = _mask(rows, context, shape.sliding_window, q.device)
    queries, heads_k, heads_v = (t.transpose(0, 1).unsqueeze(0) for t in (q, keys, values))
    if shape.softcap is None and shape.sinks is None:
        attended = F.scaled_dot_product_attention(
            queries,
            heads_k,
            heads_v,
            attn_mask=mask,
            is_causal=mask is None and rows > 1,
            scale=shape.scaling,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        return attended.squeeze(0).transpose(0, 1)
    groups = q.shape[1] // keys.shape[1]
    scores = (queries @ heads_k.repeat_interleave(groups, dim=1).transpose(-1, -2)).float() * shape.scaling
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    if mask is None and rows > 1:
        mask = torch.ones(rows, context, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if shape.sinks is not None:
        sinks = shape.sinks.float().view(1, -1, 1, 1).expand(-1, -1, rows, 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    attended = weights.to(q.dtype) @ heads_v.repeat_interleave(groups, dim=1)
    return attended.squeeze(0).transpose(0, 1)


def _mask(rows: int, context: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query may look; None where plain causality (or a single row) says it all."""
    windowed = window is not None and context > window
    if rows == 1 or (rows == context and not windowed):
        return None
    query_at = torch.arange(context - rows, context, device=device)[:, None]
    key_at = torch.arange(context, device=device)[None, :]
    mask = key_at <= query_at
    if windowed:
        assert window is not None
        mask &= key_at > query_at - window
    return mask

"""The oracle: every operation in plain torch, in float32, on any device, slow and easy to check by eye."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loramux.ops.backend import Backend, LinearPart, SiteSegment
from loramux.ops.dense import DenseWeight
from loramux.ops.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Weight
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch


def dequantize(weight: NF4Weight | DenseWeight) -> Tensor:
    """Dense float32 [N, K], from the format's definition alone (see ops/nf4.py)."""
    if isinstance(weight, DenseWeight):
        return weight.values.float()
    nibbles = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).reshape(-1)[: weight.numel]
    if weight.nested_absmax is None:
        absmax = weight.absmax
    else:
        assert weight.nested_table is not None
        assert weight.offset is not None
        scale = weight.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: weight.absmax.numel()]
        absmax = weight.nested_table[weight.absmax.long()] * scale + weight.offset
    values = weight.table[nibbles.long()] * absmax.repeat_interleave(BLOCK_SIZE)[: weight.numel]
    return values.view(weight.shape)


class ReferenceBackend(Backend):
    """Follows the definitions of `Backend` to the letter; computes in float32 and rounds once at the end."""

    name = "reference"

    def linear(self, x: Tensor, parts: Sequence[LinearPart], segments: Sequence[SiteSegment]) -> tuple[Tensor, ...]:
        rows = x.float()
        outputs = []
        for p, part in enumerate(parts):
            y = rows @ dequantize(part.weight).T
            for segment in segments:
                lora = segment.parts[p]
                if lora is None:
                    continue
                delta = rows[segment.start : segment.stop] @ lora.a.float().T @ lora.b.float().T
                if lora.bias is not None:
                    delta = delta + lora.bias.float()
                y[segment.start : segment.stop] += segment.weight * delta
                if lora.scale is not None:
                    y[segment.start : segment.stop] *= lora.scale
            if part.bias is not None:
                y = y + part.bias.float()
            outputs.append(y.to(x.dtype))
        return tuple(outputs)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: PagedBatch, shape: AttentionShape
    ) -> Tensor:
        cache.write(batch.slots, k, v)
        groups = q.shape[1] // k.shape[1]
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for s, context in enumerate(batch.contexts):
            start, stop = batch.starts[s], batch.starts[s + 1]
            keys, values = (
                t.float().repeat_interleave(groups, dim=1) for t in cache.read(batch.block_tables[s], context)
            )
            scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), keys) * shape.scaling
            if shape.softcap is not None:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            query_at = torch.arange(context - (stop - start), context, device=q.device)[:, None]
            key_at = torch.arange(context, device=q.device)[None, :]
            hidden = key_at > query_at
            if shape.sliding_window is not None:
                hidden |= key_at <= query_at - shape.sliding_window
            scores = scores.masked_fill(hidden, float("-inf"))
            if shape.sinks is not None:
                sinks = shape.sinks.float().view(-1, 1, 1).expand(-1, stop - start, 1)
                weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
            else:
                weights = scores.softmax(dim=-1)
            out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
        return out

"""Token ids to logits by a fused model's parts alone: what transformers' forward does, without most of its Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramux.model.fused import FusedDecoder, FusedHead, FusedNorm

# Embedding, rotary layers, norm, head, and nothing in between.
_MODELS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"})


class Shortcut:
    """The parts, and the rotation of every position, computed once by the model's own code (2·dim values each)."""

    def __init__(
        self, embedding: Tensor, rotary: Any, decoder: FusedDecoder, norm: FusedNorm, head: FusedHead, max_context: int
    ) -> None:
        self._embedding = embedding
        self._decoder, self._norm, self._head = decoder, norm, head
        cosines, sines = rotary(embedding, position_ids=torch.arange(max_context, device=embedding.device)[None])
        self._cosines, self._sines = cosines[0], sines[0]

    @staticmethod
    def knows(model: PreTrainedModel) -> bool:
        """Whether models of this class have one, where `fuse` can replace all of their parts."""
        return type(model).__name__ in _MODELS

    @classmethod
    def find(cls, model: PreTrainedModel, max_context: int) -> Shortcut | None:
        """None unless the model is of a class that is known, and `fuse` has replaced all of its parts."""
        head: Any = model.get_output_embeddings()
        if not cls.knows(model) or not isinstance(head, FusedHead):
            return None
        base: Any = model.model
        decoder, norm = base.layers[0], base.norm
        if not isinstance(decoder, FusedDecoder) or not isinstance(norm, FusedNorm):
            return None
        return cls(base.embed_tokens.weight, base.rotary_emb, decoder, norm, head, max_context)

    def run(self, token_ids: Tensor, positions: Tensor, logits_rows: Tensor) -> Tensor:
        """Token ids and positions [T], rows [R] → logits [R, V], over the step's batch."""
        x = self._embedding.index_select(0, token_ids)
        rotation = self._cosines.index_select(0, positions)[None], self._sines.index_select(0, positions)[None]
        y = self._decoder.forward(x[None], rotation)[0]
        return self._head.forward(self._norm.forward(y.index_select(0, logits_rows)))

"""A base model of any size with random NF4 weights, made where it computes: in seconds, without a file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from loramux.model.causal_lm import CausalLM
from loramux.model.loading import load_model
from loramux.model.sources import TensorSource
from loramux.ops.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Weight
from torch import Tensor
from transformers import AutoConfig

from loadtest.gpu.shape import Decoder
from loadtest.shapes import linear_shapes


class RandomNF4:
    """Makes NF4 weights without quantizing any: random codes, and block scales around a value that gives a product
    W·x the size of x times `gain`. The scales are themselves quantized, as in every weight that loramux keeps."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        # Only for the two tables.
        like = NF4Weight.quantize(torch.randn(BLOCK_SIZE, BLOCK_SIZE, generator=self._generator, device=device))
        self._table, self._nested_table = like.table, like.nested_table
        self._spread = float(like.table.square().mean().sqrt())

    def _bytes(self, count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=self._generator, device=self._device)

    def weight(self, outputs: int, inputs: int, gain: float = 1.0) -> NF4Weight:
        """An [outputs, inputs] weight."""
        blocks = -(-outputs * inputs // BLOCK_SIZE)
        mean = gain / (math.sqrt(inputs) * self._spread)
        nested = torch.rand(-(-blocks // NESTED_BLOCK_SIZE), generator=self._generator, device=self._device)
        return NF4Weight(
            shape=(outputs, inputs),
            codes=self._bytes(-(-outputs * inputs // 2)),
            absmax=self._bytes(blocks),
            table=self._table,
            nested_absmax=mean * (0.2 + 0.2 * nested),
            nested_table=self._nested_table,
            offset=torch.tensor(mean, device=self._device),
        )


class RandomSource(TensorSource):
    """The checkpoint of a `Decoder`: linear layers in NF4, the rest in bf16; tensors are made when asked for."""

    generation_config = None
    tokenizer = None

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self.name = self.place = decoder.name
        fields = decoder.config()
        self.config = AutoConfig.for_model(**fields)
        self._device = device
        self._nf4 = RandomNF4(device)
        self._linears = {f"{linear.path}.weight": linear for linear in linear_shapes(fields)}
        # As GPT-2 begins: what is added to the residual stream in all layers together is about as large as what enters.
        self._last_gain = 1 / math.sqrt(2 * decoder.layers)
        norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(decoder.layers)
                 for n in ("input", "post_attention")]  # fmt: skip
        self._dense = dict.fromkeys((*norms, "model.norm.weight"), (decoder.hidden,))
        self._matrices = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (decoder.vocab, decoder.hidden))
        self._companions: dict[str, Tensor] = {}

    def keys(self) -> Iterable[str]:
        return [*self._linears, *self._dense, *self._matrices]

    def get(self, key: str) -> Tensor:
        """On the device, unlike other sources' tensors."""
        if key in self._companions:
            return self._companions[key]
        if key in self._linears:
            _, inputs, outputs = linear = self._linears[key]
            gain = self._last_gain if linear.leaf in ("o_proj", "down_proj") else 1.0
            stored = self._nf4.weight(outputs, inputs, gain).to_checkpoint(key)
            codes = stored.pop(key)
            self._companions = stored
            return codes
        if key in self._dense:
            return torch.ones(self._dense[key], dtype=torch.bfloat16, device=self._device)
        vocab, hidden = self._matrices[key]
        values = torch.randn(vocab, hidden, dtype=torch.bfloat16, device=self._device)
        return values.div_(math.sqrt(hidden)) if key == "lm_head.weight" else values

    def companions(self, key: str) -> list[str]:
        """Of the weight that was got last: weights are read one at a time."""
        return [name for name in self._companions if name.startswith(key + ".")]


class NoSuchMode(Exception):
    """This build of the server has no batch-invariant mode."""


def load_random(decoder: Decoder, device: torch.device, *, invariant: bool = False) -> CausalLM:
    """A served model of this shape, through the server's own loading. Raises NoSuchMode."""
    options: dict[str, Any] = {}
    if invariant:
        if "batch_invariant" not in inspect.signature(load_model).parameters:
            raise NoSuchMode("this build of loramux has no batch-invariant mode")
        options["batch_invariant"] = True
    return load_model(RandomSource(decoder, device), device=device.type, **options).model

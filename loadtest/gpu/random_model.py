"""A base model of any size with random NF4 weights, and adapters, made on the device: in seconds, without a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from loramux.lora.layout import Factors, Offsets, lay_out
from loramux.model.causal_lm import CausalLM
from loramux.model.loading import load_model
from loramux.model.sources import TensorSource
from loramux.ops.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Weight
from loramux.ops.segment import AdapterWeights, LoraWeights
from loramux.ops.site import Site
from torch import Tensor
from transformers import AutoConfig

from loadtest.gpu.scale import Decoder
from loadtest.shapes import linear_shapes

STRENGTH = 0.1  # how large a branch is beside its input


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


class RandomAdapters:
    """Adapters of `ranks` in turn on a model's device: places in one random buffer, of which none overlap."""

    def __init__(self, model: CausalLM, ranks: Sequence[int], count: int) -> None:
        size = model.dtype.itemsize
        layouts = {rank: lay_out([Factors(site, rank) for site in model.sites], size) for rank in set(ranks)}
        offsets = {
            rank: torch.tensor([(at.a, at.b, -1, -1) for at in layout.offsets.values()])
            for rank, layout in layouts.items()
        }
        chosen = [ranks[i % len(ranks)] for i in range(count)]
        buffer = torch.empty(sum(layouts[r].elements for r in chosen), dtype=model.dtype, device=model.device)
        self.adapters: list[AdapterWeights] = []
        for rank, part in zip(chosen, buffer.split([layouts[r].elements for r in chosen]), strict=True):
            # Of independent factors this large: a branch of about STRENGTH times its input.
            part.normal_(std=(STRENGTH**2 / (rank * model.sites[0].in_features)) ** 0.25)
            views = {site.index: _views(part, layouts[rank].offsets[site.index], rank, site) for site in model.sites}
            ranks_of = torch.full((len(model.sites),), rank, dtype=torch.int32)
            self.adapters.append(AdapterWeights(part, offsets[rank], ranks_of, views))


def _views(buffer: Tensor, at: Offsets, rank: int, site: Site) -> LoraWeights:
    rows, columns = site.out_features, site.in_features
    a, b = buffer[at.a : at.a + rank * columns], buffer[at.b : at.b + rows * rank]
    return LoraWeights(a.view(rank, columns), b.view(rows, rank))


def load_random(decoder: Decoder, device: torch.device, *, invariant: bool = False) -> CausalLM:
    """A served model of this shape, through the server's own loading."""
    return load_model(RandomSource(decoder, device), device=device.type, batch_invariant=invariant).model

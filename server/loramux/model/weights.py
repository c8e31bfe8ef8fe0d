"""Reading a base model's weights one at a time: quantized where a site wants it, dense elsewhere.

A tensor is read, quantized and dropped before the next one, so the peak is the NF4 model plus the largest tensor.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from loramux.errors import InvalidAdapter, UnsupportedModel
from loramux.model.modules import SiteLinear
from loramux.model.sources import TensorSource
from loramux.model.towers import without_tower
from loramux.ops.backend import LinearPart
from loramux.ops.dense import DenseWeight
from loramux.ops.nf4 import NF4Weight
from loramux.ops.site import Site

log = logging.getLogger(__name__)


class SiteChange(Protocol):
    """What is merged into a base while it is read (lora.delta.Delta is one)."""

    def changes(self, site: Site) -> bool: ...
    def apply(self, site: Site, weight: Tensor) -> None: ...
    def bias(self, site: Site) -> Tensor | None: ...


def _rename(key: str, renamings: Sequence[WeightRenaming]) -> str:
    """A checkpoint's key as transformers would read it."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


class WeightReader:
    """Finds and reads weights of `source` by the names they have in the skeleton, which may not be the checkpoint's.

    transformers' own renamings for the model apply (GPT-NeoX's embed_out is its lm_head today). Checkpoints of a base
    model without head lack the skeleton's prefix ("model.", "transformer."); both are found. In a checkpoint with
    other towers the language model's is found without its segment ("language_model.").
    """

    def __init__(self, source: TensorSource, model: PreTrainedModel) -> None:
        self._source = source
        self._prefix = f"{model.base_model_prefix}."
        self._ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
        renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
        keys = tuple(source.keys())
        self._keys: dict[str, str] = {}  # the checkpoint's by the skeleton's
        for key in keys:
            renamed = _rename(key, renamings)
            if source.towers:
                renamed = _rename(without_tower(renamed), renamings)
            self._keys.setdefault(renamed, key)
        # A name that needs no renaming is meant as it stands.
        self._keys |= dict(zip(keys, keys, strict=True))
        self._read: set[str] = set()

    def find(self, name: str) -> str | None:
        """The checkpoint's key for a skeleton's name, or None."""
        candidates = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((self._keys[n] for n in candidates if n in self._keys), None)

    def _key(self, name: str) -> str:
        key = self.find(name)
        if key is None:
            raise UnsupportedModel(f"{self._source.name}: the checkpoint has no tensor {name!r}")
        self._read.add(key)
        return key

    def tell_unused(self) -> None:
        """Log what the checkpoint holds and nobody has read: other towers, or what the skeleton has no place for."""
        unused = set(self._source.keys()) - self._read
        for key in self._read:
            unused.difference_update(self._source.companions(key))
        left = sorted(key for key in unused if not any(pattern.search(key) for pattern in self._ignored))
        if left:
            parts = Counter(".".join(key.split(".")[: 2 if key.startswith(self._prefix) else 1]) for key in left)
            told = ", ".join(f"{count} of {part}" for part, count in parts.most_common(5))
            log.info(
                "%s: %d tensors of the checkpoint are not used (%s), %s the first",
                self._source.name,
                len(left),
                told,
                left[0],
            )

    def dense(self, name: str) -> Tensor:
        """The tensor as stored. Raises UnsupportedModel if it is missing."""
        return self._source.get(self._key(name))

    def base(self, site: Site, device: torch.device) -> NF4Weight | DenseWeight:
        """A site's weight on `device`: in NF4, or as it is stored if the source is a merged model.

        Raises what `nf4` does.
        """
        name, shape = f"{site.name}.weight", (site.out_features, site.in_features)
        if not self._source.merged:
            return self.nf4(name, shape, device, site.transposed)
        stored = self.dense(name).to(device)
        values = stored.T if site.transposed else stored
        if values.shape != shape:
            raise UnsupportedModel(f"{self._source.name}: {name} has shape {tuple(values.shape)}, not {shape}")
        return DenseWeight(values)

    def nf4(self, name: str, shape: tuple[int, int], device: torch.device, transposed: bool) -> NF4Weight:
        """The [N, K] weight in NF4 on `device`; quantized now unless the checkpoint holds it so already.

        Raises UnsupportedModel if it is missing, has another shape or cannot be quantized.
        """
        key = self._key(name)
        stored = self._source.get(key)
        try:
            if stored.dtype == torch.uint8:
                entries = self._source.get_all(self._source.companions(key))
                entries = {k.removeprefix(key + "."): entry for k, entry in entries.items()}
                weight = NF4Weight.from_checkpoint(stored, entries).to(device)
            else:
                dense = stored.to(device)
                weight = NF4Weight.quantize(dense.T if transposed else dense)
        except ValueError as error:
            raise UnsupportedModel(f"{self._source.name}: {name}: {error}") from error
        if weight.shape != shape:
            raise UnsupportedModel(f"{self._source.name}: {name} has shape {weight.shape}, not {shape}")
        return weight


def fill(
    model: PreTrainedModel,
    linears: Collection[SiteLinear],
    reader: WeightReader,
    dtype: torch.dtype,
    device: torch.device,
    change: SiteChange | None = None,
) -> Iterator[str]:
    """Load every weight of the skeleton, yielding the name of each as it is done (for progress bars).

    A layer that `change` changes is dense afterwards, computed in float32 and rounded once, to `dtype`. Raises
    InvalidAdapter for what `dtype` cannot hold then, and what `change` raises.
    """
    for linear in linears:
        site = linear.site
        weight = reader.base(site, device)
        bias = reader.dense(f"{site.name}.bias").to(device) if linear.has_bias else None
        if change is not None and change.changes(site):
            values = weight.dequantize(torch.float32)
            change.apply(site, values)
            weight = DenseWeight(rounded(values, dtype, f"{site.name}.weight").contiguous())
            if (added := change.bias(site)) is not None:
                summed = added.to(device) if bias is None else bias.float() + added.to(device)
                bias = rounded(summed, dtype, f"{site.name}.bias")
                linear.has_bias = True
        elif isinstance(weight, DenseWeight):
            weight = DenseWeight(weight.values.to(dtype, copy=True, memory_format=torch.contiguous_format))
        linear.part = LinearPart(weight, None if bias is None else bias.to(dtype))
        yield site.name
    for names, parameter in parameters(model):
        key = next((n for n in names if reader.find(n) is not None), names[0])
        value = reader.dense(key)
        if value.shape != parameter.shape:
            raise UnsupportedModel(f"{key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        value = value.to(device, dtype)
        filled = nn.Parameter(value.clone() if value.is_cpu else value, requires_grad=False)
        for name in names:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = filled
        yield key
    for name, buffer in buffers(model, reader):
        buffer.copy_(reader.dense(name))
    for module in model.modules():
        for name, held in module._buffers.items():
            if held is not None:
                module._buffers[name] = held.to(device)


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """In `dtype`. Raises InvalidAdapter if it is `name`, after a merge, that has numbers which `dtype` cannot hold."""
    cast = tensor.to(dtype)
    low, high = torch.aminmax(cast)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise InvalidAdapter(
            name,
            f"has numbers up to {float(tensor.abs().max()):.3g} once merged, which {dtype} cannot hold; use --dtype "
            "bf16 or fp32",
            reason="NOT_FINITE",
        )
    return cast


def buffers(model: nn.Module, reader: WeightReader) -> list[tuple[str, Tensor]]:
    """The skeleton's buffers that belong to a checkpoint (gemma4's layer_scalar) and that this one has."""
    belonging = set(model.state_dict())
    return [(n, b) for n, b in model.named_buffers() if n in belonging and reader.find(n) is not None]


def untie(model: PreTrainedModel, reader: WeightReader) -> None:
    """Give parameters that the config ties (embedding and head) one each where the checkpoint holds different tensors
    for them, as transformers does; the config says so afterwards."""
    for names, parameter in parameters(model):
        keys = sorted({key for key in map(reader.find, names) if key is not None})
        if len(keys) < 2 or _all_equal(reader, keys):
            continue
        for name in names[1:]:
            parent, _, leaf = name.rpartition(".")
            own = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            model.get_submodule(parent)._parameters[leaf] = own
        model.config.tie_word_embeddings = False


def _all_equal(reader: WeightReader, keys: list[str]) -> bool:
    first = reader.dense(keys[0])
    return all(torch.equal(first, reader.dense(key)) for key in keys[1:])


class StoredWeights(Mapping[str, Tensor]):
    """The dense weights of a base by the names of its skeleton, each read when it is asked for, in `dtype`."""

    def __init__(self, reader: WeightReader, model: nn.Module, dtype: torch.dtype) -> None:
        self._reader = reader
        self._dtype = dtype
        # A tied weight is stored under one of its names.
        self._stored = {
            name: key
            for names, _ in parameters(model)
            if (key := next((n for n in names if reader.find(n) is not None), None)) is not None
            for name in names
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.dense(self._stored[name]).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def parameters(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """The skeleton's parameters, each with all its names: tied ones (embedding and head) appear once."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())

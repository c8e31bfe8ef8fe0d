"""Writing an NF4 checkpoint that transformers + bitsandbytes load, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from loramux.model.skeleton import build_skeleton
from loramux.model.sources import TensorSource
from loramux.model.surgery import place_sites
from loramux.model.weights import WeightReader, buffers, parameters, untie

SHARD_BYTES = 2 << 30


def write_checkpoint(source: TensorSource, out: Path, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[int, int]]:
    """Write `source` into the existing folder `out` with its linear layers in NF4, the rest in `dtype`.

    Yields (tensors done, tensors in all). At most one shard is in memory. config.json, generation_config.json and the
    tokenizer are written last, so a folder without config.json is an unfinished one.
    Raises UnsupportedModel for a source that does not fit its own config.
    """
    skeleton = build_skeleton(source.config, dtype, "eager")
    linears = place_sites(skeleton)
    reader = WeightReader(source, skeleton)
    untie(skeleton, reader)
    dense = parameters(skeleton)
    shards = _Shards(out)
    shards.add({name: reader.dense(name).to(buffer.dtype) for name, buffer in buffers(skeleton, reader)})
    total = len(linears) + len(dense)
    for done, linear in enumerate(linears, 1):
        site = linear.site
        shape = (site.out_features, site.in_features)
        weight = reader.nf4(f"{site.name}.weight", shape, torch.device("cpu"), site.transposed)
        shards.add(weight.to_checkpoint(f"{site.name}.weight"))
        if linear.has_bias:
            shards.add({f"{site.name}.bias": reader.dense(f"{site.name}.bias").to(dtype)})
        yield done, total
    for done, (names, _) in enumerate(dense, len(linears) + 1):
        key = next((n for n in names if reader.find(n) is not None), names[0])
        shards.add({names[0]: reader.dense(key).to(dtype)})
        yield done, total
    shards.close()
    reader.tell_unused()
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    write_description(source, skeleton, out, dtype, {"quantization_config": quantization})


def write_description(
    source: TensorSource, skeleton: PreTrainedModel, out: Path, dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    """Write generation_config.json, the tokenizer and, last, config.json: the skeleton's, with `fields` over it."""
    config = {k: v for k, v in skeleton.config.to_dict().items() if k != "quantization_config"} | fields
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = config.get("architectures") or [type(skeleton).__name__]
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    if source.generation_config is not None:
        source.generation_config.save_pretrained(out)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(out)  # type: ignore[attr-defined]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class _Shards:
    """Collects tensors and writes a file whenever enough are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._files: list[tuple[Path, list[str]]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self._held and self._bytes + size > SHARD_BYTES:
            self._flush()
        self._held |= {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        path = self._folder / f"shard-{len(self._files)}.safetensors"
        save_file(self._held, path, metadata={"format": "pt"})
        self._files.append((path, list(self._held)))
        self._held, self._bytes = {}, 0

    def close(self) -> None:
        """Write what is left and give the files their final names."""
        self._flush()
        count = len(self._files)
        if count == 1:
            self._files[0][0].rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, (path, keys) in enumerate(self._files, 1):
            name = f"model-{i:05}-of-{count:05}.safetensors"
            path.rename(self._folder / name)
            weight_map |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

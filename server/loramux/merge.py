"""`loramux merge`: base + adapters as an ordinary dense model folder, complete or not at all.

W' = dequant(W) + Σ w·s·B·A, or c ⊙ (dequant(W) + s·B·A) of a DoRA adapter, is computed in fp32 from the canonical NF4
weights and rounded once, to the type it is written in. Tensors are read, merged, measured and written one at a time.
Never into NF4: that erases small deltas, see docs/merge.md.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from loramux.errors import AdapterUnavailable, InvalidAdapter
from loramux.lora.base import Base
from loramux.lora.delta import Delta
from loramux.lora.ingredient import Ingredient
from loramux.lora.limits import ReadLimits
from loramux.lora.mixing import Part, check_mix
from loramux.lora.peft_files import AdapterFiles, read_adapter
from loramux.merge_report import MERGE_REPORT, LayerError, MergeReport, MergeTerm
from loramux.model.checkpoint import write_description
from loramux.model.loading import DTYPES
from loramux.model.modules import SiteLinear
from loramux.model.skeleton import build_skeleton
from loramux.model.sources import TensorSource, open_source
from loramux.model.surgery import place_sites
from loramux.model.tensor_file import TensorFile
from loramux.model.weights import StoredWeights, WeightReader, buffers, parameters, rounded, untie
from loramux.new_folder import check_new, new_folder
from loramux.ops.site import Site

SHARD_BYTES = 4 << 30
_ROWS = 1024  # measured at a time, in fp64
_CPU = torch.device("cpu")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Item:
    """One tensor of the output, and how to make it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def merge(
    source: str | TensorSource,
    ingredients: Sequence[Ingredient],
    out: Path,
    *,
    dtype: str = "bf16",
    progress: Progress = lambda done, total: None,
) -> MergeReport:
    """Write `source` + `ingredients` into the new folder `out` in `dtype` ("bf16", "fp16" or "fp32").

    progress(done, total) is called before each tensor and after the last; what it raises ends the merge. The folder
    appears when all of it is on disk; after a failure nothing is left, and what a killed merge left is cleared first.

    Raises FolderExists or InvalidRequest (`out`), InvalidRequest (DoRA in a mix), StartupError (the source),
    InvalidAdapter (files, a bias that the architecture cannot hold, numbers that `dtype` cannot), AdapterUnavailable
    (files that changed since their digest was taken).
    """
    check_new(out)
    opened = open_source(source) if isinstance(source, str) else source
    target = DTYPES[dtype]
    skeleton = build_skeleton(copy.deepcopy(opened.config), target, "eager")
    linears = place_sites(skeleton)
    sites = [linear.site for linear in linears]
    base = Base(dense=StoredWeights(WeightReader(opened, skeleton), skeleton, target))
    read = [_read(ingredient, sites, base) for ingredient in ingredients]
    check_mix([Part(i.name, files.mixable, i.weight) for i, files in zip(ingredients, read, strict=True)])
    delta = Delta([(files, ingredient.weight) for files, ingredient in zip(read, ingredients, strict=True)])
    created = [m.site for m in linears if not m.has_bias and delta.bias(m.site) is not None]
    if created:
        skeleton, linears = _with_biases(opened.config, target, created)
    reader = WeightReader(opened, skeleton)
    untie(skeleton, reader)
    job = _Merge(reader, delta, target)
    items = list(job.items(skeleton, linears))
    with new_folder(out) as scratch:
        written = _write(items, scratch, target, progress)
        report = MergeReport(
            model=opened.name,
            adapters=tuple(
                MergeTerm(i.name, files.digest, i.weight) for i, files in zip(ingredients, read, strict=True)
            ),
            dtype=dtype,
            bytes=written,
            layers=tuple(job.layers),
            created_biases=tuple(site.name for site in created),
        )
        (scratch / MERGE_REPORT).write_text(json.dumps(report.as_dict(), indent=2) + "\n")
        write_description(opened, skeleton, scratch, target, {})
    return report


def _read(ingredient: Ingredient, sites: Sequence[Site], base: Base) -> AdapterFiles:
    files = read_adapter(ingredient.folder, sites, limits=ReadLimits(), base=base)
    if ingredient.digest and files.digest != ingredient.digest:
        raise AdapterUnavailable(
            f"the files of adapter {ingredient.name!r} in {ingredient.folder} have changed since it was loaded; load "
            "them with replace, so that what is merged is what is served",
            reason="ADAPTER_CHANGED",
            metadata={"adapter": ingredient.name},
        )
    return files


class _Merge:
    """Makes the output's tensors, and measures those that change."""

    def __init__(self, reader: WeightReader, delta: Delta, dtype: torch.dtype) -> None:
        self._reader = reader
        self._delta = delta
        self._dtype = dtype
        self.layers: list[LayerError] = []

    def items(self, skeleton: PreTrainedModel, linears: Sequence[SiteLinear]) -> Iterator[_Item]:
        """Every tensor: weights and biases of the sites, then the rest."""
        for linear in linears:
            site = linear.site
            shape = (site.out_features, site.in_features)
            yield _Item(f"{site.name}.weight", shape[::-1] if site.transposed else shape, partial(self._weight, site))
            if linear.has_bias:
                yield _Item(f"{site.name}.bias", shape[:1], partial(self._bias, site))
        for names, parameter in parameters(skeleton):
            key = next((n for n in names if self._reader.find(n) is not None), names[0])
            yield _Item(names[0], tuple(parameter.shape), partial(self._other, key))
        for name, buffer in buffers(skeleton, self._reader):
            yield _Item(name, tuple(buffer.shape), partial(self._other, name))

    def _weight(self, site: Site) -> Tensor:
        """[N, K], or [K, N] for a transposed site."""
        weight = self._reader.base(site, _CPU).dequantize(torch.float32)
        if self._delta.changes(site):
            merged = weight.clone()
            self._delta.apply(site, merged)
            written = self._rounded(merged, f"{site.name}.weight")
            self.layers.append(self._measure(site, weight, written))
        else:
            written = self._rounded(weight, f"{site.name}.weight")
        return written.T if site.transposed else written

    def _bias(self, site: Site) -> Tensor:
        """[N]; zeros where neither the base nor an adapter has one, but the architecture now wants it."""
        name = f"{site.name}.bias"
        bias = torch.zeros(site.out_features) if self._reader.find(name) is None else self._reader.dense(name).float()
        delta = self._delta.bias(site)
        return self._rounded(bias if delta is None else bias + delta, name)

    def _other(self, key: str) -> Tensor:
        return self._rounded(self._reader.dense(key).float(), key)

    def _rounded(self, tensor: Tensor, name: str) -> Tensor:
        return rounded(tensor, self._dtype, name)

    def _measure(self, site: Site, weight: Tensor, written: Tensor) -> LayerError:
        """‖W' − (W + ΔW)‖ of what is written, against W + ΔW in fp64; by blocks of rows. ΔW is the whole change."""
        squares = torch.zeros(3, dtype=torch.float64)
        for start in range(0, site.out_features, _ROWS):
            rows = slice(start, start + _ROWS)
            base = weight[rows].double()
            exact = base.clone()
            self._delta.apply(site, exact, rows)
            for i, difference in enumerate((written[rows].double() - exact, exact - base, base)):
                squares[i] += difference.square().sum()
        error, change, size = squares.sqrt().tolist()
        return LayerError(site.name, error, change, size)


def _with_biases(
    config: PretrainedConfig, dtype: torch.dtype, wanted: Sequence[Site]
) -> tuple[PreTrainedModel, tuple[SiteLinear, ...]]:
    """The architecture with biases at the `wanted` sites, by the settings its config has for them.

    Other layers may get one with them; theirs are zeros. Raises InvalidAdapter for a site that no setting gives one.
    """
    missing = {site.name for site in wanted}
    chosen = copy.deepcopy(config)
    for flag in [k for k, v in config.to_dict().items() if v is False and "bias" in k]:
        tried = copy.deepcopy(config)
        setattr(tried, flag, True)
        gained = {m.site.name for m in place_sites(build_skeleton(tried, dtype, "eager")) if m.has_bias}
        if gained & missing:
            setattr(chosen, flag, True)
            missing -= gained
    skeleton = build_skeleton(chosen, dtype, "eager")
    if missing:
        first = next(site.name for site in wanted if site.name in missing)
        raise InvalidAdapter(
            f"{first}.lora_B.bias",
            f"cannot be merged: {type(skeleton).__name__} has no bias at {len(missing)} of the adapter's layers, and "
            "its config has no setting that gives them one; serve the adapter in the batch or with `loramux serve "
            "--merged`, or train with lora_bias=false",
            reason="UNSUPPORTED_ADAPTER",
        )
    return skeleton, place_sites(skeleton)


def _write(items: Sequence[_Item], folder: Path, dtype: torch.dtype, progress: Progress) -> int:
    """Write the tensors, in files of at most SHARD_BYTES (or one tensor) each. Returns their bytes."""
    sizes = [math.prod(item.shape) * dtype.itemsize for item in items]
    shards: list[list[_Item]] = [[]]
    room = SHARD_BYTES
    for item, size in zip(items, sizes, strict=True):
        if shards[-1] and size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(item)
        room -= size
    done = 0
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with TensorFile(folder / name, {item.name: item.shape for item in shard}, dtype) as file:
            for item in shard:
                progress(done, len(items))
                file.add(item.name, item.make())
                done += 1
        files |= dict.fromkeys((item.name for item in shard), name)
    progress(done, len(items))
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": sum(sizes)}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return sum(sizes)

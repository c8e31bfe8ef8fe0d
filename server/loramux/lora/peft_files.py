"""A PEFT LoRA folder as checked factors, ready to be placed. Safetensors only; PEFT itself is not needed.

Knows files, shapes and scales; not devices, names of adapters, or who may read what (lora.roots).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from loramux.errors import InvalidAdapter, LoramuxError
from loramux.lora.base import NOTHING_KNOWN, Base
from loramux.lora.chat_template import own_chat_template, same_template
from loramux.lora.folder import AdapterFolder
from loramux.lora.header import TensorEntry
from loramux.lora.limits import ReadLimits
from loramux.lora.matching import FactorKey, match_sites, parse_key
from loramux.lora.peft_config import PeftConfig, parse_config, shown
from loramux.lora.roots import WEIGHTS_FILE
from loramux.lora.saved import check_saved
from loramux.lora.selection import Selection
from loramux.lora.snapshot import FolderSnapshot, take_snapshot
from loramux.lora.warnings import OTHER_TEMPLATE, unusable_template, warnings_of
from loramux.ops.site import Site

_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARD = (
    "one process's part of a sharded model was saved. Gather it before save_pretrained (FSDP: FULL_STATE_DICT; "
    "DeepSpeed ZeRO-3: stage3_gather_16bit_weights_on_model_save)"
)
_INCOMPLETE = "save the adapter again, or restore the file that belongs to the config"


@dataclass(frozen=True, slots=True, eq=False)
class SiteFactors:
    """One site's tensors as the file has them: a [r, in / pooling], b [out, r], bias and magnitude [out]; `scale` not
    applied. `pooling` is the number of inputs that share a column of a (QA-LoRA), else 1."""

    site: Site
    rank: int
    scale: float
    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    pooling: int = 1

    def add_to(self, weight: Tensor, share: float = 1.0, rows: slice = slice(None)) -> None:
        """Add share·s·B·A to W [out, in] (or some of its rows) in its place, in its dtype and on its device."""
        a, b = (t.to(weight.device, weight.dtype) for t in (self.a, self.b[rows]))
        weight.addmm_(b, a.repeat_interleave(self.pooling, dim=1), alpha=share * self.scale)

    def output_scale(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """DoRA's magnitude / ‖W + s·B·A‖, the norm over the inputs: [out]. `weight` is that sum, or some of its rows.

        From the factors as the file has them, as PEFT does (tuners/lora/dora.py), not as the compute dtype rounds
        them. Raises InvalidAdapter where the quotient is no finite number.
        """
        assert self.magnitude is not None
        norm = torch.linalg.vector_norm(weight, dim=1)
        scale: Tensor = self.magnitude[rows].to(norm.device, norm.dtype) / norm
        if not all_finite(scale):
            raise InvalidAdapter(
                f"{self.site.name}.lora_magnitude_vector",
                "cannot be divided by the norm of W + s*B*A, which is 0 or too large in some rows; the adapter was "
                "trained on another base, or the training diverged",
                reason="NOT_FINITE",
            )
        return scale


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """A checked adapter. `factors` are in the order of the sites' indices, views into one host buffer; `warnings` are
    sentences about what can be served and is hardly meant; `chat_template` is its own, if it is to be used."""

    config: PeftConfig
    digest: str
    factors: tuple[SiteFactors, ...]
    warnings: tuple[str, ...] = ()
    chat_template: str | None = None

    @property
    def mixable(self) -> bool:
        """Whether what it adds can be added to what others add: not so for DoRA."""
        return not self.config.use_dora


def read_adapter(
    folder: AdapterFolder | Path, sites: Sequence[Site], *, limits: ReadLimits, base: Base = NOTHING_KNOWN
) -> AdapterFiles:
    """Read and check the adapter in `folder` for a base with `sites`.

    Every tensor is used or refused, A and B come in pairs, shapes agree with the base and ranks with the config, the
    config selects what the file holds, all numbers are finite. `base` is what else is known of the base: tensors of
    its own that the file holds are let pass if they are the same, and some warnings need it. Raises InvalidAdapter that
    names the file, field or tensor, and the way out.
    """
    snapshot = take_snapshot(folder, limits)
    config = parse_config(snapshot.config)
    keys = [parse_key(entry.key) for entry in snapshot.entries]
    if keys and all(key.of_base for key in keys):
        raise InvalidAdapter(
            WEIGHTS_FILE,
            f"has no tensors of LoRA but {len(keys)} of a model, e.g. {keys[0].key}: a whole model, or one that the "
            "adapter was merged into; take what PEFT's save_pretrained wrote before the merge",
            reason="UNSUPPORTED_ADAPTER",
        )
    _check_finite(snapshot)
    notes = check_saved(
        [(key, _tensor(e, snapshot)) for key, e in zip(keys, snapshot.entries, strict=True) if key.of_base], base
    )
    own = [(key, entry) for key, entry in zip(keys, snapshot.entries, strict=True) if not key.of_base]
    by_module = match_sites([key for key, _ in own], sites)
    parts = _by_module(own)
    paths = {key.module: _paths(key, by_module[key.module]) for key, _ in own}
    selected = config.selection()
    trained = _as_trained(paths, selected)
    factors = []
    for module, site in by_module.items():
        _check_selected(paths[module], parts[module], selected, config, trained)
        factors.append(_site_factors(site, paths[module], parts[module], snapshot, config, limits))
    told = warnings_of(config, selected, paths, factors, sites, base)
    try:
        template = own_chat_template(folder)
    except LoramuxError as error:
        template = None
        told.append(unusable_template(error))
    if template is not None and (same_template(template, base.chat_template) or not template.strip()):
        template = None
    if template is not None and base.check_template is None:
        told.append(OTHER_TEMPLATE)
        template = None
    elif template is not None and base.check_template is not None:
        base.check_template(template)
    in_order = tuple(sorted(factors, key=lambda f: f.site.index))
    return AdapterFiles(config, snapshot.digest, in_order, (*notes, *told), template)


def _paths(key: FactorKey, site: Site) -> tuple[str, ...]:
    """What patterns of the config may have been written against: the module in training, without and with what wrapped
    it, and in this base."""
    return tuple(dict.fromkeys((key.module, key.seen, site.name)))


def _as_trained(paths: Mapping[str, tuple[str, ...]], selected: Selection) -> int | None:
    """How many of the paths exclude_modules was written against, None for all: -1 if it leaves out every module by its
    path in this base, and none by those of training ("all but the language model", where that is all there is here)."""
    named = list(paths.values())
    if all(len(names) > 1 and selected.excludes(names[-1]) for names in named):
        return None if any(selected.excludes(name) for names in named for name in names[:-1]) else -1
    return None


def _check_selected(
    paths: tuple[str, ...],
    parts: Mapping[str, TensorEntry],
    selected: Selection,
    config: PeftConfig,
    trained: int | None,
) -> None:
    """Raises InvalidAdapter if a field leaves the module out: PEFT would not apply its tensors either."""
    key = next(iter(parts.values())).key
    field = selected.left_out_by(paths, trained=trained)
    if field is not None:
        value = getattr(config, field)
        pattern = "; a text is a pattern of the whole path, names go into a list" if isinstance(value, str) else ""
        raise InvalidAdapter(
            field,
            f"leaves out {paths[0]}, for which {WEIGHTS_FILE} has tensors ({key}); PEFT would ignore them. Correct "
            f"{field} ({shown(value)}{pattern}), or drop these tensors",
            reason="CONFIG_MISMATCH",
        )
    for parameter in config.target_parameters or ():
        if any(f".{path}".endswith(f".{parameter.rpartition('.')[0]}") for path in paths):
            raise InvalidAdapter(
                "target_parameters",
                f"{shown(parameter)}: {key} changes a parameter and not a linear layer; train with target_modules",
                reason="UNSUPPORTED_ADAPTER",
            )


def _by_module(tensors: Sequence[tuple[FactorKey, TensorEntry]]) -> dict[str, dict[str, TensorEntry]]:
    """Module → part → entry. Two tensors for one part (two adapters in one file) are refused."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in tensors:
        parts = found.setdefault(key.module, {})
        if key.part in parts:
            raise InvalidAdapter(
                key.key,
                f"is the same part as {parts[key.part].key!r}; a file holds one adapter: save them one by one with "
                "save_pretrained(..., selected_adapters=[name])",
                reason="UNSUPPORTED_ADAPTER",
            )
        parts[key.part] = entry
    return found


def _site_factors(
    site: Site,
    paths: tuple[str, ...],
    parts: Mapping[str, TensorEntry],
    snapshot: FolderSnapshot,
    config: PeftConfig,
    limits: ReadLimits,
) -> SiteFactors:
    _check_parts(paths[0], parts, config)
    rank = config.rank_of(*paths)
    _check_shapes(site, rank, config.pooling, parts, limits)
    a, b = _tensor(parts["A"], snapshot), _tensor(parts["B"], snapshot)
    bias = _tensor(parts["bias"], snapshot) if "bias" in parts else None
    magnitude = _tensor(parts["magnitude"], snapshot) if "magnitude" in parts else None
    scale = config.scale_of(rank, *paths) * _pooled_scale(site, config)
    return SiteFactors(site, rank, scale, a, b, bias, magnitude, config.pooling)


def _pooled_scale(site: Site, config: PeftConfig) -> float:
    """What each input of a group is multiplied with: PEFT takes their mean, times the number of groups.

    QALoraLinearVariant in PEFT's tuners/lora/variants.py; the paper (Xu et al. 2023, arXiv:2309.14717) differs.
    """
    return site.in_features / config.pooling**2 if config.use_qalora else 1.0


def _check_parts(module: str, parts: Mapping[str, TensorEntry], config: PeftConfig) -> None:
    """Raises InvalidAdapter unless the tensors of a module are those that the config says it has."""
    for part, name in (("A", "lora_A.weight"), ("B", "lora_B.weight")):
        if part not in parts:
            raise InvalidAdapter(module, f"has no {name} in {WEIGHTS_FILE}; {_INCOMPLETE}", reason="CORRUPT_ADAPTER")
    for part, name, field in (("bias", "lora_B.bias", "lora_bias"), ("magnitude", "lora_magnitude_vector", "use_dora")):
        asked = bool(getattr(config, field))
        if asked and part not in parts:
            message = f"has no {name} ({field} is true) in {WEIGHTS_FILE}; {_INCOMPLETE}"
            raise InvalidAdapter(module, message, reason="CORRUPT_ADAPTER")
        if part in parts and not asked:
            raise InvalidAdapter(
                parts[part].key,
                f"is there, but adapter_config.json does not say {field}=true; correct one of the two",
                reason="CONFIG_MISMATCH",
            )


def _check_shapes(site: Site, rank: int, pooling: int, parts: Mapping[str, TensorEntry], limits: ReadLimits) -> None:
    a, b = parts["A"], parts["B"]
    for entry, dims in ((a, 2), (b, 2)):
        if len(entry.shape) != dims or 0 in entry.shape:
            raise InvalidAdapter(
                entry.key,
                f"has shape {list(entry.shape)}, not two sizes of at least 1; if it is empty or flat, {_SHARD}",
                reason="CORRUPT_ADAPTER",
            )
    if pooling > 1 and a.shape[1] == site.in_features:
        raise InvalidAdapter(
            a.key,
            f"has a column for each of the {a.shape[1]} inputs, but adapter_config.json says use_qalora=true, which "
            f"pools {pooling} of them; if the base was not a GPTQ one, PEFT trained plain LoRA: set use_qalora=false",
            reason="CONFIG_MISMATCH",
        )
    if pooling > 1 and a.shape[1] * pooling != site.in_features:
        raise InvalidAdapter(
            a.key,
            f"has {a.shape[1]} columns for groups of {pooling} inputs (qalora_group_size), but {site.name} of this "
            f"base has {site.in_features} in features; correct qalora_group_size, or load it on the base it was "
            "trained on",
            reason="BASE_MISMATCH",
        )
    if pooling == 1 and a.shape[1] != site.in_features:
        raise _other_base(a, site, "columns", a.shape[1], "in", site.in_features)
    if b.shape[0] != site.out_features:
        raise _other_base(b, site, "rows", b.shape[0], "out", site.out_features)
    for entry, found in ((a, a.shape[0]), (b, b.shape[1])):
        if found != rank:
            if a.shape[0] != b.shape[1] and (share := _share(found, rank)):
                raise InvalidAdapter(
                    entry.key,
                    f"has shape {list(entry.shape)}, {share} of the rank {rank}: {_SHARD}",
                    reason="CORRUPT_ADAPTER",
                )
            raise InvalidAdapter(
                entry.key,
                f"has rank {found} (shape {list(entry.shape)}), but adapter_config.json gives this layer rank "
                f"{rank}; correct r or rank_pattern, or restore the file that belongs to the config",
                reason="RANK_MISMATCH",
                metadata={"tensor_rank": found, "config_rank": rank},
            )
    if rank > limits.rank:
        raise InvalidAdapter(a.key, f"has rank {rank}; the limit is {limits.rank}", reason="ADAPTER_TOO_LARGE")
    for part in ("bias", "magnitude"):
        if part in parts and parts[part].shape != (site.out_features,):
            entry = parts[part]
            share = _share(entry.shape[0], site.out_features) if len(entry.shape) == 1 else None
            raise InvalidAdapter(
                entry.key,
                f"has shape {list(entry.shape)}, not [{site.out_features}], the out features of {site.name}; "
                + (f"that is {share} of them: {_SHARD}; or " if share else "")
                + "the adapter was trained on another base",
                reason="BASE_MISMATCH",
            )


def _other_base(entry: TensorEntry, site: Site, what: str, found: int, side: str, size: int) -> InvalidAdapter:
    share = _share(found, size)
    return InvalidAdapter(
        entry.key,
        f"has {found} {what} (shape {list(entry.shape)}), but {site.name} of this base has {size} {side} features; "
        + (f"that is {share} of them: {_SHARD}; or " if share else "")
        + "the adapter was trained on another base",
        reason="BASE_MISMATCH",
    )


def _share(found: int, whole: int) -> str | None:
    """ "1/2" if that is what `found` is of `whole`, or the first of two parts, rounded up; None if it is none such."""
    parts = -(-whole // found) if 0 < found < whole else 0
    return f"1/{parts}" if parts and found == -(-whole // parts) else None


def _tensor(entry: TensorEntry, snapshot: FolderSnapshot) -> Tensor:
    """The entry's numbers as a view into the snapshot."""
    return _numbers(entry, snapshot, entry.nbytes).view(entry.shape)


def _numbers(first: TensorEntry, snapshot: FolderSnapshot, nbytes: int) -> Tensor:
    dtype = _DTYPES[first.dtype]
    if nbytes == 0:  # a shard that holds nothing of a tensor; frombuffer refuses it
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(snapshot.weights, dtype=dtype, count=nbytes // dtype.itemsize, offset=first.start)


def _check_finite(snapshot: FolderSnapshot) -> None:
    """Raises InvalidAdapter for the first tensor with NaN or Inf. Neighbours of one dtype are looked at in one go."""
    for _, run in groupby(snapshot.entries, key=lambda entry: entry.dtype):
        entries = list(run)
        if all_finite(_numbers(entries[0], snapshot, sum(entry.nbytes for entry in entries))):
            continue
        for entry in entries:
            if not all_finite(flat := _numbers(entry, snapshot, entry.nbytes)):
                bad = int((~torch.isfinite(flat)).sum())
                raise InvalidAdapter(
                    entry.key,
                    f"holds {bad} NaN or Inf among {flat.numel()} numbers; the training diverged or the file is "
                    "damaged",
                    reason="NOT_FINITE",
                )


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or Inf; in one pass without a temporary, since aminmax hands NaN on."""
    return tensor.numel() == 0 or all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))

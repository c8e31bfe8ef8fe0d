"""A PEFT LoRA folder as checked factors, ready to be placed. Safetensors only; PEFT itself is not needed.

Knows files, shapes and scales; not devices, names of adapters, or who may read what (lora.roots).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loramux.errors import InvalidAdapter
from loramux.lora.header import TensorEntry
from loramux.lora.limits import ReadLimits
from loramux.lora.matching import FactorKey, match_sites, parse_key
from loramux.lora.peft_config import PeftConfig, parse_config
from loramux.lora.roots import WEIGHTS_FILE
from loramux.lora.snapshot import FolderSnapshot, take_snapshot
from loramux.ops.site import Site

_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class SiteFactors:
    """One site's tensors as the file has them: a [r, in], b [out, r], bias [out]; scale not applied."""

    site: Site
    rank: int
    scale: float
    a: Tensor
    b: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """A checked adapter. `factors` are in the order of the sites' indices, views into one host buffer."""

    config: PeftConfig
    digest: str
    factors: tuple[SiteFactors, ...]


def read_adapter(folder: Path, sites: Sequence[Site], *, limits: ReadLimits) -> AdapterFiles:
    """Read and check the adapter in `folder` for a base with `sites`.

    Every tensor is used or refused, A and B come in pairs, shapes agree with the base and ranks with the config, all
    numbers are finite. Raises InvalidAdapter that names the file, field or tensor, and the way out.
    """
    snapshot = take_snapshot(folder, limits)
    config = parse_config(snapshot.config)
    keys = [parse_key(entry.key) for entry in snapshot.entries]
    by_module = match_sites(keys, sites)
    parts = _by_module(keys, snapshot.entries)
    factors = [
        _site_factors(module, by_module[module], parts[module], snapshot, config, limits) for module in by_module
    ]
    return AdapterFiles(config, snapshot.digest, tuple(sorted(factors, key=lambda f: f.site.index)))


def _by_module(keys: Sequence[FactorKey], entries: Sequence[TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Module → part → entry. Two tensors for one part (two adapters in one file) are refused."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in zip(keys, entries, strict=True):
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
    module: str,
    site: Site,
    parts: Mapping[str, TensorEntry],
    snapshot: FolderSnapshot,
    config: PeftConfig,
    limits: ReadLimits,
) -> SiteFactors:
    wanted = ["A", "B", "bias"] if config.lora_bias else ["A", "B"]
    for part in wanted:
        if part not in parts:
            name = "lora_B.bias (lora_bias is true)" if part == "bias" else f"lora_{part}.weight"
            raise InvalidAdapter(module, f"has no {name} in {WEIGHTS_FILE}", reason="CORRUPT_ADAPTER")
    if "bias" in parts and not config.lora_bias:
        raise InvalidAdapter(
            parts["bias"].key,
            "is a bias, but adapter_config.json does not say lora_bias=true; correct one of the two",
            reason="CONFIG_MISMATCH",
        )
    rank = config.rank_of(module)
    _check_shapes(site, rank, parts, limits)
    a, b = _tensor(parts["A"], snapshot), _tensor(parts["B"], snapshot)
    bias = _tensor(parts["bias"], snapshot) if "bias" in parts else None
    return SiteFactors(site, rank, config.scale_of(module, rank), a, b, bias)


def _check_shapes(site: Site, rank: int, parts: Mapping[str, TensorEntry], limits: ReadLimits) -> None:
    a, b = parts["A"], parts["B"]
    for entry, dims in ((a, 2), (b, 2)):
        if len(entry.shape) != dims or 0 in entry.shape:
            raise InvalidAdapter(
                entry.key,
                f"has shape {list(entry.shape)}, not two sizes of at least 1; a sharded model must be gathered "
                "before save_pretrained (DeepSpeed ZeRO-3, FSDP)",
                reason="CORRUPT_ADAPTER",
            )
    if a.shape[1] != site.in_features:
        raise _other_base(a, site, "columns", a.shape[1], "in", site.in_features)
    if b.shape[0] != site.out_features:
        raise _other_base(b, site, "rows", b.shape[0], "out", site.out_features)
    for entry, found in ((a, a.shape[0]), (b, b.shape[1])):
        if found != rank:
            raise InvalidAdapter(
                entry.key,
                f"has rank {found} (shape {list(entry.shape)}), but adapter_config.json gives this layer rank "
                f"{rank}; correct r or rank_pattern, or restore the file that belongs to the config",
                reason="RANK_MISMATCH",
                metadata={"tensor_rank": found, "config_rank": rank},
            )
    if rank > limits.rank:
        raise InvalidAdapter(a.key, f"has rank {rank}; the limit is {limits.rank}", reason="ADAPTER_TOO_LARGE")
    if "bias" in parts and parts["bias"].shape != (site.out_features,):
        raise InvalidAdapter(
            parts["bias"].key,
            f"has shape {list(parts['bias'].shape)}, not [{site.out_features}]",
            reason="BASE_MISMATCH",
        )


def _other_base(entry: TensorEntry, site: Site, what: str, found: int, side: str, size: int) -> InvalidAdapter:
    return InvalidAdapter(
        entry.key,
        f"has {found} {what} (shape {list(entry.shape)}), but {site.name} of this base has {size} {side} features; "
        "the adapter was trained on another base",
        reason="BASE_MISMATCH",
    )


def _tensor(entry: TensorEntry, snapshot: FolderSnapshot) -> Tensor:
    """The entry's numbers as a view into the snapshot; all of them finite."""
    dtype = _DTYPES[entry.dtype]
    flat = torch.frombuffer(snapshot.weights, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.start)
    if not all_finite(flat):
        bad = int((~torch.isfinite(flat)).sum())
        raise InvalidAdapter(
            entry.key,
            f"holds {bad} NaN or Inf among {flat.numel()} numbers; the training diverged or the file is damaged",
            reason="NOT_FINITE",
        )
    return flat.view(entry.shape)


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or Inf; in one pass without a temporary, since aminmax hands NaN on."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))

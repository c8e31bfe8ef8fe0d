"""Adapter folders for the tiny model that must be refused, of every kind, and what each must be refused with."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loramux.lora.limits import ReadLimits
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE
from safetensors.torch import load_file, save_file

from tests.lora.test_read_adapter import BROKEN_FILES
from tests.server.stack import save_adapter

INVALID = "INVALID_ARGUMENT"
DENIED = "PERMISSION_DENIED"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


@dataclass(frozen=True)
class Kind:
    """`edit` breaks a good folder, whose config has `config`; the load ends with `reason`, and a text with `says`.

    An empty `reason` is any.
    """

    reason: str
    says: str
    edit: Callable[[Path], object] = lambda folder: None
    status: str = INVALID
    config: Mapping[str, Any] = field(default_factory=dict)


def _data(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(data)


def _config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG_FILE).write_text(text)


def _cut(size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / WEIGHTS_FILE, size)


def _without(*files: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / file).unlink() for file in files]


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        held = load_file(folder / WEIGHTS_FILE)
        change(held)
        save_file(held, folder / WEIGHTS_FILE)

    return edit


def _put(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], object]:
    return _tensors(lambda held: held.update({key: torch.ones(*shape, dtype=dtype)}))


def _drop(key: str) -> Callable[[Path], object]:
    return _tensors(lambda held: held.pop(key))


def _number(key: str, value: float) -> Callable[[Path], object]:
    return _tensors(lambda held: held[key].view(-1)[0].fill_(value))


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    torch.save({}, folder / "adapter_model.bin")


def _too_deep(folder: Path) -> None:
    save_adapter(folder, layers=4)


def _rank_beyond_the_limit(folder: Path) -> None:
    rank = ReadLimits().rank + 1
    save_file({A: torch.ones(rank, 64), B: torch.ones(64, rank)}, folder / WEIGHTS_FILE)


def _linked_out(folder: Path) -> None:
    outside = shutil.move(folder / WEIGHTS_FILE, folder.parent.parent / f"{folder.name}.secret")
    (folder / WEIGHTS_FILE).symlink_to(outside)


def _folder_linked_out(folder: Path) -> None:
    outside = folder.parent.parent / f"{folder.name}-secret"
    folder.rename(outside)
    folder.symlink_to(outside)


_MAGNITUDE = f"{Q0}.lora_magnitude_vector"
_DORA = {"use_dora": True}
KINDS: dict[str, Kind] = {
    **{f"file: {label}": Kind("", says, _data(data)) for label, (data, says) in BROKEN_FILES.items()},
    "truncated": Kind("CORRUPT_ADAPTER", "cut off", _cut(5000)),
    "truncated header": Kind("CORRUPT_ADAPTER", "cut off", _cut(20)),
    "file over the limit": Kind("ADAPTER_TOO_LARGE", "the limit is", _cut(ReadLimits().file_bytes + 1)),
    "empty folder": Kind("ADAPTER_FILES_MISSING", CONFIG_FILE, _without(CONFIG_FILE, WEIGHTS_FILE)),
    "no weights": Kind("ADAPTER_FILES_MISSING", WEIGHTS_FILE, _without(WEIGHTS_FILE)),
    "no config": Kind("ADAPTER_FILES_MISSING", CONFIG_FILE, _without(CONFIG_FILE)),
    "pickled": Kind("ADAPTER_FILES_MISSING", "never opened", _pickled),
    "no folder": Kind("ADAPTER_FILES_MISSING", "there is no folder", shutil.rmtree),
    "vanishes": Kind("ADAPTER_FILES_MISSING", "has no adapter_", lambda folder: None),  # its test removes it
    "config not JSON": Kind("INVALID_CONFIG", "not valid JSON", _config("{")),
    "config a list": Kind("INVALID_CONFIG", "not an object", _config("[]")),
    "config beyond the limit": Kind("ADAPTER_TOO_LARGE", "the limit is", _config(" " * (2 << 20))),
    "r = 0": Kind("INVALID_CONFIG", "r: ", config={"r": 0}),
    "r is text": Kind("INVALID_CONFIG", "r: ", config={"r": "4"}),
    "alpha is NaN": Kind("INVALID_CONFIG", "not a JSON number", config={"lora_alpha": math.nan}),
    "not LoRA": Kind("UNSUPPORTED_ADAPTER", "peft_type", config={"peft_type": "IA3"}),
    "a trained bias": Kind("UNSUPPORTED_ADAPTER", f"{Q0}.bias", _put(f"{Q0}.bias", 64), config={"bias": "all"}),
    "modules_to_save": Kind(
        "UNSUPPORTED_ADAPTER",
        "modules_to_save",
        _put("base_model.model.score.modules_to_save.default.weight", 2, 64),
        config={"modules_to_save": ["score"]},
    ),
    "another embedding": Kind(
        "UNSUPPORTED_ADAPTER", "drop it", _put("base_model.model.model.embed_tokens.weight", 9, 64)
    ),
    "fewer targets than tensors": Kind("CONFIG_MISMATCH", "target_modules", config={"target_modules": ["q_proj"]}),
    "fewer layers than tensors": Kind("CONFIG_MISMATCH", "layers_to_transform", config={"layers_to_transform": [0]}),
    "excluded layers with tensors": Kind("CONFIG_MISMATCH", "exclude_modules", config={"exclude_modules": ["v_proj"]}),
    "alpha beyond float32": Kind("INVALID_CONFIG", "lora_alpha", config={"lora_alpha": 1e308}),
    "PiSSA": Kind("UNSUPPORTED_ADAPTER", "init_lora_weights", config={"init_lora_weights": "pissa"}),
    "unknown field": Kind("UNSUPPORTED_ADAPTER", "use_magic", config={"use_magic": True}),
    "lm_head as the only target": Kind("CONFIG_MISMATCH", "lm_head", config={"target_modules": ["lm_head"]}),
    "lm_head's tensors": Kind("UNSUPPORTED_ADAPTER", "lm_head", _put("base_model.model.lm_head.lora_A.weight", 4, 64)),
    "unknown key": Kind("BASE_MISMATCH", "foo", _put("base_model.model.foo.lora_A.weight", 4, 64)),
    "layer out of range": Kind("BASE_MISMATCH", "layers.3.", _too_deep),
    "NaN": Kind("NOT_FINITE", A, _number(A, math.nan)),
    "infinite": Kind("NOT_FINITE", B, _number(B, -math.inf)),
    "too large once scaled": Kind("NOT_FINITE", "do not fit", _number(B, 3e38)),
    "no lora_A": Kind("CORRUPT_ADAPTER", "no lora_A.weight", _drop(A)),
    "no lora_B": Kind("CORRUPT_ADAPTER", "no lora_B.weight", _drop(B)),
    "A of another width": Kind("BASE_MISMATCH", "96 columns", _put(A, 4, 96)),
    "B of another height": Kind("BASE_MISMATCH", "96 rows", _put(B, 96, 4)),
    "A of three dimensions": Kind("CORRUPT_ADAPTER", "[4, 64, 1]", _put(A, 4, 64, 1)),
    "not gathered": Kind("CORRUPT_ADAPTER", "ZeRO-3", _put(A, 0)),
    "integer weights": Kind("UNSUPPORTED_ADAPTER", "I32", _put(A, 4, 64, dtype=torch.int32)),
    "a rank that lies": Kind("RANK_MISMATCH", "rank 7", config={"r": 7}),
    "rank beyond the limit": Kind(
        "ADAPTER_TOO_LARGE", "the limit is", _rank_beyond_the_limit, config={"r": ReadLimits().rank + 1}
    ),
    "DoRA without a magnitude": Kind("CORRUPT_ADAPTER", "lora_magnitude_vector", _drop(_MAGNITUDE), config=_DORA),
    "DoRA of NaN": Kind("NOT_FINITE", "lora_magnitude_vector", _number(_MAGNITUDE, math.nan), config=_DORA),
    "QA-LoRA of another group size": Kind(
        "BASE_MISMATCH", "qalora_group_size", config={"use_qalora": True, "qalora_group_size": 7}
    ),
    "a file that is a link out": Kind("PATH_NOT_ALLOWED", "outside", _linked_out, DENIED),
    "a folder that is a link out": Kind("PATH_NOT_ALLOWED", "outside", _folder_linked_out, DENIED),
}
# What is asked for by a path, not by a folder of a root: label → source.
SOURCES: dict[str, tuple[str, Kind]] = {
    "out by ..": ("../outside", Kind("PATH_NOT_ALLOWED", "outside", status=DENIED)),
    "an absolute path": ("/etc", Kind("PATH_NOT_ALLOWED", "outside", status=DENIED)),
    "NUL in the path": ("a\0b", Kind("INVALID_VALUE", "NUL")),
}


def write_broken(root: Path) -> dict[str, Kind]:
    """Every one of KINDS as a folder of `root`: its name → the kind."""
    made = {}
    for label, kind in KINDS.items():
        name = "bad-" + "".join(c if c.isalnum() else "-" for c in label)
        variant = {
            field: value for field, value in kind.config.items() if field.startswith(("use_dora", "use_qa", "qa"))
        }
        folder = save_adapter(root / name, **variant)
        file = folder / CONFIG_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(kind.config)))
        kind.edit(folder)
        made[name] = kind
    assert len(made) == len(KINDS)
    return made

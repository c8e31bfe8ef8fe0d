"""Random adapters in PEFT's file format: valid, deterministic, cheap, and of no use but to be served.

Written with numpy alone. `safetensors.numpy` has no bfloat16, and torch would cost seconds of import, so the
file format (a length, a JSON header, the bytes) is written here by hand; a test reads it back with
safetensors and PEFT.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.shapes import Linear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What one random adapter looks like.

    `scale` is lora_alpha / r. `strength` is about how large the adapter's branch is beside the base's output
    ‖s·B·A·x‖ / ‖x‖: 0.1 changes the greedy text within a few tokens and keeps 30 layers far from overflow.
    """

    rank: int
    seed: int
    scale: float = 2.0
    strength: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not (self.scale > 0 and self.strength > 0):
            raise ValueError("scale and strength must be positive")


def write_adapters(
    out: Path,
    linears: Sequence[Linear],
    *,
    count: int,
    ranks: Sequence[int],
    seed: int = 0,
    scale: float = 2.0,
    strength: float = 0.1,
    base_model: str = "",
    prefix: str = "a-",
    on_written: Callable[[Path], None] = lambda folder: None,
) -> list[Path]:
    """Write `count` adapters named `prefix`000 … under `out`; adapter i has rank ranks[i mod len(ranks)].

    The same arguments give the same bytes; another seed or another index gives other weights.
    Raises ValueError for a rank, scale or strength out of range.
    """
    folders = []
    for index in range(count):
        spec = AdapterSpec(ranks[index % len(ranks)], hash_seed(seed, index), scale, strength)
        folder = out / f"{prefix}{index:03d}"
        write_adapter(folder, linears, spec, base_model=base_model)
        folders.append(folder)
        on_written(folder)
    return folders


def link_adapters(root: Path, folders: Sequence[Path], *, count: int, prefix: str = "a-") -> list[Path]:
    """Make `count` folders named `prefix`00000 … under `root`, in turn of each of `folders`; weights are hard links.

    So thousands take the disk, and the page cache, of a few; digests repeat. All on one file system, and before a
    server looks: a later link changes a file's status time, and the server takes that for a change of the adapter.
    """
    linked = []
    for index in range(count):
        source = folders[index % len(folders)]
        folder = root / f"{prefix}{index:05d}"
        folder.mkdir(parents=True)
        (folder / WEIGHTS_FILE).hardlink_to(source / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_bytes((source / CONFIG_FILE).read_bytes())
        linked.append(folder)
    return linked


def hash_seed(seed: int, index: int) -> int:
    """Return a seed of its own for each (seed, index): neighbours share no stream."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def write_adapter(folder: Path, linears: Sequence[Linear], spec: AdapterSpec, *, base_model: str = "") -> None:
    """Write one adapter folder: adapter_config.json and adapter_model.safetensors (bf16)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_FILE, random_weights(linears, spec))
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": spec.scale * spec.rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": sorted({linear.leaf for linear in linears}),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    if float(config["lora_alpha"]).is_integer():  # type: ignore[arg-type]
        config["lora_alpha"] = int(config["lora_alpha"])  # type: ignore[call-overload]
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def random_weights(linears: Sequence[Linear], spec: AdapterSpec) -> dict[str, npt.NDArray[np.uint16]]:
    """Return PEFT tensor name → bf16 bits: lora_A [r, in] as PEFT initializes it, lora_B [out, r] small and
    not zero.

    A is uniform in ±1/√in (Kaiming with a = √5), so an entry of A·x is about rms(x)/√3; B's deviation makes
    the scaled branch `strength` times rms(x), whatever the rank.
    """
    rng = np.random.default_rng(spec.seed)
    deviation = spec.strength * math.sqrt(3.0) / (spec.scale * math.sqrt(spec.rank))
    tensors: dict[str, npt.NDArray[np.uint16]] = {}
    for path, inputs, outputs in linears:
        a = rng.random((spec.rank, inputs), dtype=np.float32)
        a -= 0.5
        a *= 2.0 / math.sqrt(inputs)
        b = rng.standard_normal((outputs, spec.rank), dtype=np.float32)
        b *= deviation
        tensors[f"base_model.model.{path}.lora_A.weight"] = to_bf16(a)
        tensors[f"base_model.model.{path}.lora_B.weight"] = to_bf16(b)
    return tensors


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round finite float32 to bfloat16, ties to even, and return the 16 bits."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, npt.NDArray[np.uint16]]) -> None:
    """Write bf16 tensors in the order given; nothing stands under `path` before the file is complete."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8, as the format recommends
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).data)
    partial.replace(path)

"""The header of a safetensors file, checked by us before any byte of it is used. Imports no torch.

The format: 8 bytes length N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
Every byte of the data must belong to exactly one tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from loramux.errors import InvalidAdapter
from loramux.lora.limits import ReadLimits
from loramux.lora.roots import WEIGHTS_FILE

LENGTH_BYTES = 8
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_KEY = 192  # characters; module paths of real models stay below 128
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file. `start` is its first byte, counted from the file's beginning."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def header_length(prefix: bytes, file_bytes: int, limits: ReadLimits) -> int:
    """Bytes of the JSON header, from the file's first 8 bytes. Raises InvalidAdapter if it cannot be true."""
    if prefix.startswith(_PICKLES):
        raise _corrupt(
            "is a pickle (torch.save) under another name; pickles are never opened. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'adapter_model.safetensors')"
        )
    if len(prefix) < LENGTH_BYTES:
        raise _corrupt(f"has {file_bytes} bytes, too few for a header; it is empty or was cut off")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > limits.header_bytes:
        raise _corrupt(f"claims a header of {length} bytes; the limit is {limits.header_bytes}")
    if length > file_bytes - LENGTH_BYTES:
        raise _corrupt(f"claims a header of {length} bytes but has {file_bytes} in all; it was cut off")
    return length


def parse_header(header: bytes, file_bytes: int, limits: ReadLimits) -> tuple[TensorEntry, ...]:
    """The tensors that `header` (the JSON alone) declares, in the order of their bytes.

    Raises InvalidAdapter.
    """
    fields = _load_json(header)
    fields.pop("__metadata__", None)
    if len(fields) > limits.tensors:
        raise _corrupt(f"has {len(fields)} tensors; the limit is {limits.tensors}")
    data = LENGTH_BYTES + len(header)
    entries = sorted((_entry(key, value, data) for key, value in fields.items()), key=lambda e: (e.start, e.nbytes))
    end = data
    for entry in entries:
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            raise _corrupt(f"{entry.key!r} starts at byte {entry.start} and not at {end}: it {what}")
        end += entry.nbytes
    if end != file_bytes:
        state = "it was cut off" if end > file_bytes else "it has bytes that belong to no tensor"
        raise _corrupt(f"has {file_bytes} bytes but its tensors end at {end}; {state}")
    return tuple(entries)


def _load_json(header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name appears twice")
        return found

    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"its header is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _corrupt("its header is not a JSON object")
    return fields


def _entry(key: str, value: object, data: int) -> TensorEntry:
    if len(key) > _MAX_KEY:
        raise _corrupt(f"the tensor name {key[:64]!r}… has {len(key)} characters; the limit is {_MAX_KEY}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(f"{key!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise InvalidAdapter(
            key,
            f"has dtype {str(dtype)[:32]!r}; adapters are read in {', '.join(_ITEM_BYTES)}: save it with "
            "tensor.float()",
            reason="UNSUPPORTED_ADAPTER",
        )
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _corrupt(f"{key!r} has a shape or data_offsets that are not lists of whole numbers")
    start, end = offsets
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - start != nbytes:
        raise _corrupt(f"{key!r} is {dtype} {shape}, that is {nbytes} bytes, but its data_offsets span {end - start}")
    return TensorEntry(key, dtype, tuple(shape), data + start, nbytes)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _corrupt(message: str) -> InvalidAdapter:
    return InvalidAdapter(WEIGHTS_FILE, message, reason="CORRUPT_ADAPTER")

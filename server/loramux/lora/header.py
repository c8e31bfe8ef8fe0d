"""The header of a safetensors file, checked by us before any byte of it is used. Imports no torch.

The format: 8 bytes length N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
Every byte of the data must belong to exactly one tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from loramux.errors import InvalidAdapter
from loramux.lora.file_type import SIGNATURE_BYTES, describe
from loramux.lora.limits import ReadLimits
from loramux.lora.roots import WEIGHTS_FILE

LENGTH_BYTES = 8
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_KEY = 192  # characters; module paths of real models stay below 128
_MAX_DIMS = 8  # numbers of 48 bits each: their product stays cheap
_MAX_ENTRY = 1024  # characters of the JSON that describes one tensor
_MAX_METADATA = 1 << 18  # characters of __metadata__
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(object_pairs_hook=list)  # made once, which takes longer than to decode an entry
START_BYTES = SIGNATURE_BYTES  # of the file are what header_length wants to see


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file. `start` is its first byte, counted from the file's beginning."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


_FLOATS = ("F64", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_TO_FLOAT = (
    f"Convert it in its folder: python -c \"import safetensors.torch; f = '{WEIGHTS_FILE}'; "
    'safetensors.torch.save_file({k: v.float() for k, v in safetensors.torch.load_file(f).items()}, f)"'
)
_NO_FLOAT = "These are no numbers of a LoRA, or quantized ones: load it in what wrote it, and save it in float32"


def header_length(start: bytes, file_bytes: int, limits: ReadLimits) -> int:
    """Bytes of the JSON header, from the file's first START_BYTES. Raises InvalidAdapter if it cannot be true."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    fits = length <= min(limits.header_bytes, file_bytes - LENGTH_BYTES)
    # A header begins with a brace, so a file of another format is told from one whose length happens to fit.
    if not fits or start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        what = describe(start)
        if what is not None:
            raise _corrupt(what)
        if start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and (
            int.from_bytes(start[:LENGTH_BYTES], "big") <= file_bytes - LENGTH_BYTES
        ):
            raise _corrupt("has its header's length in big-endian byte order; write it with safetensors' save_file")
    if len(start) < LENGTH_BYTES:
        raise _corrupt(f"has {file_bytes} bytes, too few for a header; it was cut off")
    if length > limits.header_bytes:
        raise _corrupt(f"claims a header of {length} bytes; the limit is {limits.header_bytes}: it is no safetensors")
    if not fits:
        raise _corrupt(f"claims a header of {length} bytes but has {file_bytes} in all; it was cut off")
    return length


def parse_header(header: bytes, file_bytes: int, limits: ReadLimits) -> tuple[TensorEntry, ...]:
    """The tensors that `header` (the JSON alone) declares, in the order of their bytes.

    Raises InvalidAdapter.
    """
    data = LENGTH_BYTES + len(header)
    entries = sorted(_entries(header, data, limits), key=lambda e: (e.start, e.nbytes))
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


def _entries(header: bytes, data: int, limits: ReadLimits) -> Collection[TensorEntry]:
    """The tensors that the JSON describes; `data` is where theirs begins.

    Read and checked one by one, each of bounded length: the parser in C holds the interpreter's lock, and a whole
    header of 16 MiB can take it five seconds.
    """
    try:
        text = header.decode("utf-8")
        at = _skip_space(text, 0)
        if text[at : at + 1] != "{":
            raise _corrupt("its header is not a JSON object")
        found: dict[str, TensorEntry] = {}
        metadata = False
        at = _skip_space(text, at + 1)
        while text[at : at + 1] != "}":
            name, at = _name(text, at)
            if name in found or (metadata and name == "__metadata__"):
                raise ValueError(f"the name {name[:64]!r} appears twice")
            if name == "__metadata__":
                metadata = True
                at = _skip_metadata(text, at)
            else:
                described, at = _described(text, at, name)
                found[name] = _entry(name, described, data)
                if len(found) > limits.tensors:
                    raise _corrupt(f"has too many tensors; the limit is {limits.tensors}")
            at = _skip_space(text, at)
            if text[at : at + 1] == ",":
                at = _skip_space(text, at + 1)
            elif text[at : at + 1] != "}":
                raise ValueError(f"a comma or a closing brace is missing at character {at}")
        if _skip_space(text, at + 1) != len(text):
            raise ValueError(f"something follows its end at character {at}")
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"its header is not valid JSON: {error}") from None
    return found.values()


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "it matches nothing, too"
    return found.end()


def _name(text: str, at: int) -> tuple[str, int]:
    """The string at `at`, and where the value that it names begins."""
    if text[at : at + 1] != '"':
        raise ValueError(f"a name in quotes is missing at character {at}")
    name, at = _DECODER.raw_decode(text, at)
    at = _skip_space(text, at)
    if text[at : at + 1] != ":":
        raise ValueError(f"a colon is missing at character {at}")
    return name, _skip_space(text, at + 1)


def _described(text: str, at: int, name: str) -> tuple[Any, int]:
    """The flat object at `at`, and where it ends."""
    if text[at : at + 1] != "{":
        raise _corrupt(f"{name[:64]!r} is not described by dtype, shape and data_offsets")
    end = text.find("}", at, at + _MAX_ENTRY) + 1
    if not end:
        raise ValueError(f"what describes {name[:64]!r} has no end within {_MAX_ENTRY} characters")
    pairs = _DECODER.decode(text[at:end])
    described = dict(pairs)
    if len(described) != len(pairs):
        raise ValueError(f"a name appears twice in what describes {name[:64]!r}")
    return described, end


def _skip_metadata(text: str, at: int) -> int:
    try:
        _, length = json.JSONDecoder().raw_decode(text[at : at + _MAX_METADATA])
    except (ValueError, RecursionError):
        raise ValueError(f"its __metadata__ is broken, or longer than {_MAX_METADATA} characters") from None
    return at + length


def _entry(key: str, value: object, data: int) -> TensorEntry:
    if len(key) > _MAX_KEY:
        raise _corrupt(f"the tensor name {key[:64]!r}… has {len(key)} characters; the limit is {_MAX_KEY}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(f"{key!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise InvalidAdapter(
            key,
            f"has dtype {str(dtype)[:32]!r}; adapters are read in {', '.join(_ITEM_BYTES)}. "
            + (_TO_FLOAT if dtype in _FLOATS else _NO_FLOAT),
            reason="UNSUPPORTED_ADAPTER",
        )
    if isinstance(shape, list) and len(shape) > _MAX_DIMS:
        raise _corrupt(f"{key!r} has {len(shape)} dimensions; the limit is {_MAX_DIMS}")
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

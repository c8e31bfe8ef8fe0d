"""A safetensors file written tensor by tensor, so that one tensor is in memory and not the file.

The format (https://huggingface.co/docs/safetensors, "Format"): the header's length in 8 bytes, little-endian; the
header as JSON with each tensor's dtype, shape and place; the tensors' bytes without gaps. The library's own writer
wants all tensors at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGN = 8


class TensorFile:
    """A context manager: `add` every tensor of `shapes`, in that order; the file is on disk when it is left.

    All tensors have the same `dtype`: float32, float16 or bfloat16.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._dtype = dtype
        self._waiting = iter(shapes)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGN)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, cast to the file's dtype already."""
        assert name == next(self._waiting)
        assert (tuple(tensor.shape), tensor.dtype) == (self._shapes[name], self._dtype)
        self._file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                assert next(self._waiting, None) is None, "a tensor is missing"
                self._file.flush()
                os.fsync(self._file.fileno())

"""Where Triton's kernels run in tests: on a CUDA device if there is one, else in Triton's interpreter on the CPU.

Import this before anything that imports triton: whether it interprets is decided then.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def round_like_a_gpu() -> None:
    """The interpreter of triton 3.6 cuts float32 off where it makes bfloat16 of it; a GPU rounds to nearest even."""
    from triton.runtime import interpreter

    convert: Any = interpreter._convert_float

    def rounding(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(values, source, target, mode)  # type: ignore[no-any-return]
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = rounding


def let_loops_end_at_tensors() -> None:
    """The interpreter of triton 3.6 keeps a scalar as an array of one element; numpy 2.4 makes no int of those."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if DEVICE.type == "cpu":
    round_like_a_gpu()
    let_loops_end_at_tensors()

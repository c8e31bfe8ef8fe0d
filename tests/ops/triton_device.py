"""Where Triton's kernels run in tests: on a CUDA device if there is one, else in Triton's interpreter on the CPU.

Whether it interprets is settled in tests/conftest.py, before anything imports triton.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Real shapes, or small ones of the same kinds: in the interpreter, and under compute-sanitizer (GPU_SMOKE=small).
LARGE = DEVICE.type == "cuda" and os.environ.get("GPU_SMOKE") != "small"
EXAMPLES = 5 if DEVICE.type == "cuda" else 12  # of one property: on a device, each compiles kernels of its own


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


def patch_the_language_once_a_launch() -> None:
    """For each call of a function inside a kernel the interpreter looks through all of triton.language again."""
    from triton.runtime import interpreter

    launch: Any = interpreter.GridExecutor.__call__
    patched: set[str] = set()  # modules whose view of the language is

    def launching(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launching
    interpreter.InterpretedFunction.__call__ = call


def sum_all_rows_alike(patch: pytest.MonkeyPatch) -> None:
    """The interpreter's dot is a BLAS's, which sums the rows of a matrix in different orders; tensor cores do not."""
    from triton.runtime import interpreter

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        products = np.einsum("mk,kn->mn", *(t.data.astype(np.float32) for t in (a, b)), optimize=False)
        return interpreter.TensorHandle(products + d.data, d.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


if DEVICE.type == "cpu":
    round_like_a_gpu()
    let_loops_end_at_tensors()
    patch_the_language_once_a_launch()

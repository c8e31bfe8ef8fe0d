"""Which backend serves a device and a dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from loramux.ops.backend import Backend

log = logging.getLogger(__name__)


TRITON_DTYPES = (torch.bfloat16, torch.float16)  # what the Triton kernels compute in
# What Triton's matrix products of bfloat16 need.
_LEAST_CAPABILITY = (8, 0)
# The cards that `make gpu-check` has passed on, by their compute capability: docs/gpu.md.
_TRIED = frozenset({(9, 0)})


def select_backend(
    device: torch.device,
    dtype: torch.dtype,
    compiling: Callable[[int, int], None] | None = None,
    *,
    batch_invariant: bool = False,
) -> Backend:
    """The fastest backend that works here; imported only when it is chosen.

    On a CPU in bfloat16 the native kernels, on a GPU in bfloat16 or float16 the Triton kernels; where they cannot be
    had, torch and bitsandbytes, with one warning. What a GPU gets is logged in one sentence. compiling(done, total) is
    called after each file if the native kernels have to be compiled first. batch_invariant is a wish: the backend says
    whether it fulfils it.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        from loramux.ops.cpu.backend import NativeBackend
        from loramux.ops.cpu.build import Unavailable, load_native

        try:
            load_native(progress=compiling)  # where the backend finds it
            return NativeBackend()
        except Unavailable as error:
            log.warning("native CPU kernels are not available (%s); serving with torch, several times slower", error)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        missing = _missing()
        fits = takes_kernels(capability, dtype) and not missing
        log.log(
            logging.INFO if fits else logging.WARNING,
            "%s",
            what_a_card_gets(torch.cuda.get_device_name(device), capability, dtype, missing),
        )
        if fits:
            from loramux.ops.cuda.backend import TritonBackend

            return TritonBackend(device, batch_invariant=batch_invariant)
    from loramux.ops.grouped import GroupedBackend

    return GroupedBackend()


def takes_kernels(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run on a GPU of that compute capability, in that dtype."""
    return capability >= _LEAST_CAPABILITY and dtype in TRITON_DTYPES


def what_a_card_gets(name: str, capability: tuple[int, int], dtype: torch.dtype, missing: str = "") -> str:
    """One sentence: which kernels run on the GPU `name`, what falls back, and whether that was ever tried.

    `missing`: why Triton cannot be imported.
    """
    card = f"{name} (compute capability {capability[0]}.{capability[1]}, {str(dtype).removeprefix('torch.')})"
    if takes_kernels(capability, dtype) and not missing:
        gets = "Triton kernels for NF4, adapters, attention and sampling, decode steps as CUDA graphs"
    else:
        if capability < _LEAST_CAPABILITY:
            reason = "they need compute capability {}.{}".format(*_LEAST_CAPABILITY)
            if dtype == torch.bfloat16:
                reason += ", and bfloat16 is emulated here: --dtype fp16 is faster"
        else:
            reason = missing or "they compute in bfloat16 and float16"
        gets = f"no Triton kernels ({reason}) and no CUDA graphs, but torch and bitsandbytes, several times slower"
    tried = "" if capability in _TRIED else "; not tried on such a card yet"
    return f"{card}: {gets}{tried}"


def _missing() -> str:
    """Why Triton cannot be imported; empty if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""

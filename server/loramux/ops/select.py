"""Which backend serves a device and a dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from loramux.ops.backend import Backend

log = logging.getLogger(__name__)


# What Triton's matrix products of bfloat16 need.
_LEAST_CAPABILITY = (8, 0)


def select_backend(
    device: torch.device,
    dtype: torch.dtype,
    compiling: Callable[[int, int], None] | None = None,
    *,
    batch_invariant: bool = False,
) -> Backend:
    """The fastest backend that works here; imported only when it is chosen.

    On a CPU in bfloat16 the native kernels, on a GPU in bfloat16 or float16 the Triton kernels; where they cannot be
    had, torch and bitsandbytes, with one warning. compiling(done, total) is called after each file if the native
    kernels have to be compiled first. batch_invariant is a wish: the backend says whether it fulfils it.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        from loramux.ops.cpu.backend import NativeBackend
        from loramux.ops.cpu.build import Unavailable, load_native

        try:
            load_native(progress=compiling)  # where the backend finds it
            return NativeBackend()
        except Unavailable as error:
            log.warning("native CPU kernels are not available (%s); serving with torch, several times slower", error)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        reason = _no_triton(device)
        if reason is None:
            from loramux.ops.cuda.backend import TritonBackend

            return TritonBackend(device, batch_invariant=batch_invariant)
        log.warning("Triton kernels cannot run here (%s); serving with torch, several times slower", reason)
    from loramux.ops.grouped import GroupedBackend

    return GroupedBackend()


def _no_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on the GPU; None if they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return "compute capability {}.{}, and they need {}.{}".format(*capability, *_LEAST_CAPABILITY)
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return None

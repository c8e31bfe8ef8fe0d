"""Which backend serves a device and a dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from loramux.ops.backend import Backend

log = logging.getLogger(__name__)


def select_backend(
    device: torch.device, dtype: torch.dtype, compiling: Callable[[int, int], None] | None = None
) -> Backend:
    """The fastest backend that works here; imported only when it is chosen.

    On a CPU in bfloat16 the native kernels; where they cannot be had, torch and bitsandbytes, with one warning.
    compiling(done, total) is called after each file if the kernels have to be compiled first.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        from loramux.ops.cpu.backend import NativeBackend
        from loramux.ops.cpu.build import Unavailable, load_native

        try:
            load_native(progress=compiling)  # where the backend finds it
            return NativeBackend()
        except Unavailable as reason:
            log.warning("native CPU kernels are not available (%s); serving with torch, several times slower", reason)
    from loramux.ops.grouped import GroupedBackend

    return GroupedBackend()

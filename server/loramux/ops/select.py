"""Which backend serves a device and a dtype."""

from __future__ import annotations

import logging

import torch

from loramux.ops.backend import Backend

log = logging.getLogger(__name__)


def select_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest backend that works here; imported only when it is chosen.

    On a CPU in bfloat16 the native kernels; where they cannot be had, torch and bitsandbytes, with one warning.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        from loramux.ops.cpu.backend import NativeBackend
        from loramux.ops.cpu.build import Unavailable

        try:
            return NativeBackend()
        except Unavailable as reason:
            log.warning("native CPU kernels are not available (%s); serving with torch, several times slower", reason)
    from loramux.ops.grouped import GroupedBackend

    return GroupedBackend()

"""Which backend serves a device."""

from __future__ import annotations

import torch

from loramux.ops.backend import Backend


def select_backend(device: torch.device) -> Backend:
    """The fastest backend that works on `device`; imported only when it is chosen."""
    from loramux.ops.grouped import GroupedBackend

    return GroupedBackend()

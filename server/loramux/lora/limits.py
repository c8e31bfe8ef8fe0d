"""How large adapter files may be. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Bounds that are checked before memory is taken for what they bound.

    config_bytes  largest adapter_config.json
    header_bytes  largest JSON header of adapter_model.safetensors
    file_bytes    largest adapter_model.safetensors
    tensors       most tensors in it
    rank          largest rank of one site (kernels have no limit; this one bounds time and memory)
    """

    config_bytes: int = 1 << 19
    header_bytes: int = 16 << 20
    file_bytes: int = 4 << 30
    tensors: int = 65_536
    rank: int = 4096

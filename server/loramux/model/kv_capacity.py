"""How many KV blocks fit into the memory that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loramux.errors import StartupError

if TYPE_CHECKING:
    from loramux.model.causal_lm import CausalLM
    from loramux.values import Memory

# Shares of the free memory that are taken when nothing is said. A GPU is the model's own; a CPU's memory is not.
_AUTO_SHARE = {"cpu": 0.1, "cuda": 0.85}


def kv_blocks(model: CausalLM, memory: Memory | None, block_size: int, most: int) -> int:
    """Blocks of `block_size` tokens for `memory`, at most `most`. Raises StartupError if not one request fits."""
    block_bytes = model.kv_bytes_per_token * block_size
    free = free_bytes(model.device)
    given = int(_AUTO_SHARE[model.device.type] * free) if memory is None else memory.resolve(free)
    blocks = min(given // block_bytes, most)
    least = -(-model.max_context // block_size)
    if blocks < least:
        raise StartupError(
            f"--kv-memory: {given / 2**20:.0f} MiB hold {max(blocks, 0) * block_size} tokens, less than one request of "
            f"{model.max_context} tokens ({least * block_bytes / 2**20:.0f} MiB); give more memory or a smaller "
            "--max-context"
        )
    return blocks


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: the device's, or for the CPU what the system and the control group leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_meminfo_available()]
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except OSError:
        pass  # no control group of version 2
    return max(0, min(free))


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise StartupError("/proc/meminfo has no MemAvailable; give --kv-memory in bytes")

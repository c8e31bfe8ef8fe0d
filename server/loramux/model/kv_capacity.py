"""How many KV blocks fit into the memory that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loramux.errors import StartupError
from loramux.model.graphs import MEMORY as GRAPHS

if TYPE_CHECKING:
    from loramux.model.causal_lm import CausalLM
    from loramux.values import Memory

# Shares of the free memory that are taken when nothing is said. A GPU is the model's own; a CPU's memory is not.
_AUTO_SHARE = {"cpu": 0.1, "cuda": 0.85}

_LOGITS_COPIES = 3  # as float32, after the rules, as probabilities


def kv_blocks(
    model: CausalLM, memory: Memory | None, block_size: int, most: int, *, adapters: int = 0, step: int = 0
) -> int:
    """Blocks of `block_size` tokens for `memory`, at most `most`.

    On a GPU, what is free is what `adapters` and `step` bytes leave, which are taken only later: the budget of
    adapters, and `step_bytes`. Raises StartupError if not one request fits, or what is wanted is not there.
    """
    block_bytes = model.kv_bytes_per_token * block_size
    least = -(-model.max_context // block_size)
    free = free_bytes(model.device)
    if model.device.type == "cuda":
        left = free - adapters - step
        if left < least * block_bytes:
            raise StartupError(
                f"{model.device}: of {_mib(free)} that the weights leave, adapters may take {_mib(adapters)} "
                f"(--adapter-memory) and a step takes {_mib(step)} (--max-batch-tokens); the KV cache of one request "
                f"of {model.max_context} tokens needs {_mib(least * block_bytes)}: lower one of these or --max-context"
            )
        free = left
    given = int(_AUTO_SHARE[model.device.type] * free) if memory is None else memory.resolve(free)
    if model.device.type == "cuda" and given > free:
        raise StartupError(
            f"--kv-memory: {_mib(given)} are more than the {_mib(free)} that weights, adapters ({_mib(adapters)}, "
            f"--adapter-memory) and a step ({_mib(step)}) leave on {model.device}"
        )
    blocks = min(given // block_bytes, most)
    if blocks * block_bytes > free:  # a CPU's memory is promised to whoever asks, and who uses it is killed
        raise StartupError(
            f"--kv-memory: {_mib(given)}, of which {_mib(blocks * block_bytes)} could ever be used, are more than the "
            f"{_mib(free)} that are free now; give less, or lower --max-batch-rows or --max-context"
        )
    if blocks < least:
        raise StartupError(
            f"--kv-memory: {_mib(given)} hold {max(blocks, 0) * block_size} tokens, less than one request of "
            f"{model.max_context} tokens ({_mib(least * block_bytes)}); give more memory or a smaller --max-context"
        )
    return blocks


def step_bytes(model: CausalLM, tokens: int, rows: int) -> int:
    """An upper bound of what a step of `tokens` tokens, `rows` of which give logits, takes for a while; and the CUDA
    graphs, which take it for good.

    Of a layer, the widest inputs and outputs of its linear operations are alive at once, twice with what is made of
    them, and one weight in 16 bits where many rows make it worth while to dequantize it. Of the logits, the sampler
    holds some copies in float32.
    """
    widest = max(site.in_features + site.out_features for site in model.sites)
    weight = max(site.in_features * site.out_features for site in model.sites)
    size = model.dtype.itemsize
    # Up to three sites (q, k, v) are one operation.
    layer = 3 * (2 * tokens * widest + weight) * size
    logits = rows * model.vocab_size * (size + 4 * _LOGITS_COPIES)
    return layer + logits + (GRAPHS if model.can_capture else 0)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: the device's, or for the CPU what the system and the control group leave."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has used is free, though torch still holds it
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

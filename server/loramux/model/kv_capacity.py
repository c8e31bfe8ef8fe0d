"""How the memory that a model's weights leave is shared out: adapters, a step, CUDA graphs, KV blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from loramux.config import Settings
from loramux.errors import StartupError, TooLittleMemory
from loramux.model.graphs import MEMORY as GRAPHS
from loramux.ops.site import Site
from loramux.values import Memory

# Shares of the free memory that are taken when nothing is said. A GPU is the model's own; a CPU's memory is not.
_AUTO_SHARE = {"cpu": 0.1, "cuda": 0.85}

# Bytes a token, in float32: K is cut into shares until 528 programs of 64 outputs each have one (ops.cuda.linear), so
# there are less than twice as many.
_INVARIANT_SHARES = 2 * 528 * 64 * 4
_LOGITS_COPIES = 3  # as float32, after the rules, as probabilities


class PlannedModel(Protocol):
    """What memory is planned by: a loaded model (model.causal_lm), or the outline of one (model.outline)."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def sites(self) -> tuple[Site, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def kv_bytes_per_token(self) -> int: ...
    @property
    def can_capture(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes that are taken only once the KV cache has its own, and on a GPU are kept free for it.

    adapters  most of adapters (--adapter-memory)
    step      most of a step, for a while (`step_bytes`)
    graphs    most of CUDA graphs
    """

    adapters: int
    step: int
    graphs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.adapters + self.step + self.graphs


def reserve(model: PlannedModel, settings: Settings) -> Reserve:
    """What to keep free for what these settings allow."""
    step = step_bytes(model, settings.max_batch_tokens, settings.max_batch_rows, invariant=settings.batch_invariant)
    return Reserve(settings.adapter_memory, step, GRAPHS if model.can_capture else 0)


def least_kv_blocks(model: PlannedModel, block_size: int) -> int:
    """Blocks that one sequence of the greatest length takes."""
    return -(-model.max_context // block_size)


def room_for_one(model: PlannedModel, settings: Settings, block_size: int) -> int:
    """Bytes to be left for the KV cache so that --kv-memory of them hold one sequence of the greatest length."""
    one, memory = least_kv_blocks(model, block_size) * block_size * model.kv_bytes_per_token, kv_memory(model, settings)
    if memory.bytes is not None:
        return max(one, memory.bytes)
    return math.ceil(one / memory.fraction) + 1  # for a share is rounded down


def kv_memory(model: PlannedModel, settings: Settings) -> Memory:
    """What the KV cache may take: --kv-memory, or the share of the free memory that it takes when nothing is said."""
    return settings.kv_memory or Memory(fraction=_AUTO_SHARE[model.device.type])


def most_kv_blocks(model: PlannedModel, settings: Settings, block_size: int) -> int:
    """Blocks that --max-batch-rows sequences of the greatest length take."""
    return settings.max_batch_rows * least_kv_blocks(model, block_size)


def kv_blocks(model: PlannedModel, settings: Settings, block_size: int, free: int) -> int:
    """Blocks of `block_size` tokens to allocate, of `free` bytes that the weights leave; at most `most_kv_blocks`.

    Raises TooLittleMemory if not one request fits, or what --kv-memory wants is not there.
    """
    block_bytes = model.kv_bytes_per_token * block_size
    least, most = least_kv_blocks(model, block_size), most_kv_blocks(model, settings, block_size)
    memory, kept = kv_memory(model, settings), reserve(model, settings)
    room = room_for_one(model, settings, block_size)
    if model.device.type == "cuda":
        left = free - kept.total
        if left < least * block_bytes:
            raise TooLittleMemory(
                f"{model.device}: of {_mib(free)} that the weights leave, adapters may take {_mib(kept.adapters)} "
                f"(--adapter-memory), a step {_mib(kept.step)} (--max-batch-tokens) and CUDA graphs "
                f"{_mib(kept.graphs)}; the KV cache of one request of {model.max_context} tokens needs "
                f"{_mib(least * block_bytes)} of what is left: lower one of these or --max-context",
                room - left,
            )
        free = left
    given = memory.resolve(free)
    if model.device.type == "cuda" and given > free:
        raise TooLittleMemory(
            f"--kv-memory: {_mib(given)} are more than the {_mib(free)} that weights, adapters ({_mib(kept.adapters)}, "
            f"--adapter-memory), a step ({_mib(kept.step)}) and CUDA graphs ({_mib(kept.graphs)}) leave on "
            f"{model.device}",
            given - free,
        )
    blocks = min(given // block_bytes, most)
    if blocks * block_bytes > free:  # a CPU's memory is promised to whoever asks, and who uses it is killed
        raise TooLittleMemory(
            f"--kv-memory: {_mib(given)}, of which {_mib(blocks * block_bytes)} could ever be used, are more than the "
            f"{_mib(free)} that are free now; give less, or lower --max-batch-rows or --max-context",
            blocks * block_bytes - free,
        )
    if blocks < least:
        raise TooLittleMemory(
            f"--kv-memory: {_mib(given)} hold {max(blocks, 0) * block_size} tokens, less than one request of "
            f"{model.max_context} tokens ({_mib(least * block_bytes)}); give more memory or a smaller --max-context",
            room - (free if memory.bytes is None else given),
        )
    return blocks


def step_bytes(model: PlannedModel, tokens: int, rows: int, *, invariant: bool = False) -> int:
    """An upper bound of what a step of `tokens` tokens, `rows` of which give logits, takes for a while.

    Of a layer, the widest inputs and outputs of its linear operations are alive at once, twice with what is made of
    them, and one weight in 16 bits where many rows make it worth while to dequantize it; if `invariant`, none is, but
    of many rows, too, there are shares of the sums. Of the logits, the sampler holds some copies in float32.
    """
    widest = max(site.in_features + site.out_features for site in model.sites)
    weight = max(site.in_features * site.out_features for site in model.sites)
    size = model.dtype.itemsize
    # Up to three sites (q, k, v) are one operation.
    layer = 3 * (2 * tokens * widest + weight) * size
    if invariant:
        layer = max(layer, tokens * (2 * widest * size + _INVARIANT_SHARES))
    logits = rows * model.vocab_size * (size + 4 * _LOGITS_COPIES)
    return layer + logits


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

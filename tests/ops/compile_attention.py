"""Compiles, without a GPU, the kernels that attention launches, and prints what each needs; run by a test.

    python -m tests.ops.compile_attention CAPABILITY     (80, 90)

A driver that stands for a card of that capability lets `attention` run up to its launches, which compile only.
A line a kernel: name, registers, bytes of local memory (spills), bytes of shared memory,
asynchronous copies of 16 bytes a thread.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from loramux.ops.cuda.attention import attention
from loramux.ops.cuda.precompile import Card, needs
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from triton.runtime.jit import JITFunction

# Heads, key-value heads, dimensions of keys and values, window, softcap, sinks.
SHAPES = {
    "llama-3-8b": (32, 8, 128, 128, None, None, False),
    "unequal": (9, 3, 80, 64, 128, None, True),
    "gemma-2": (8, 4, 256, 256, 4096, 50.0, False),
}


def compile_all(capability: int) -> None:
    triton.runtime.driver.set_active(Card(capability))
    launch: Any = JITFunction.run
    current = ""

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        registers, local = needs(kernel.asm["cubin"])
        copies = kernel.asm["ptx"].count("cp.async.cg.shared.global")
        print(current, self.__name__, registers, local, kernel.metadata.shared, copies)
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]
    for name, (heads, kv_heads, dim, value_dim, window, softcap, sinks) in SHAPES.items():
        current = name
        shape = AttentionShape(dim**-0.5, window, softcap, torch.zeros(heads, dtype=torch.bfloat16) if sinks else None)
        cache = LayerCache.allocate(1, 16, kv_heads, dim, value_dim, torch.bfloat16, torch.device("cpu"))
        for starts, contexts in (((0, 1, 2), (1024, 8192)), ((0, 1, 129), (1024, 1024))):
            batch = PagedBatch(
                torch.zeros(starts[-1], dtype=torch.int64),
                torch.tensor(starts, dtype=torch.int32),
                torch.tensor(contexts, dtype=torch.int32),
                torch.zeros(len(contexts), 512, dtype=torch.int32),
                starts,
                contexts,
            )
            q, k, v = (
                torch.zeros(starts[-1], n, width, dtype=torch.bfloat16)
                for n, width in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
            )
            attention(q, k, v, cache, batch, shape)
        attention(q, k, v, cache, batch, shape, invariant=True)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))

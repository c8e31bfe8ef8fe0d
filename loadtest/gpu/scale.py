"""The models that are measured, as config.json has them, and how much is done: on a GPU, and in a dry run on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadtest.cells import CELLS, Cell

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 1024,
}  # fmt: skip
TINY = LLAMA_8B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done of everything. Of rows, what matters most comes first: time may run out."""

    device: str
    model: Mapping[str, Any]
    context: int
    first_rows: tuple[int, ...]
    all_rows: tuple[int, ...]
    rank: int
    mixed_ranks: tuple[int, ...]
    gemm_rows: tuple[int, ...]
    gemm_bytes: int  # NF4 copies of an operation are made until they take this much: no cache holds them
    matmul: int
    copy_bytes: int
    served: Mapping[str, Any]
    cells: tuple[Cell, ...]


FULL = Scale(
    device="cuda", model=LLAMA_8B, context=1024, first_rows=(1, 32), all_rows=(1, 32, 8, 64), rank=16,
    mixed_ranks=(8, 16, 32, 64), gemm_rows=(1, 8, 16, 32, 64), gemm_bytes=256 << 20, matmul=8192, copy_bytes=4 << 30,
    served=LLAMA_8B | {"num_hidden_layers": 2, "vocab_size": 32000}, cells=CELLS[:5],
)  # fmt: skip
DRY = Scale(
    device="cpu", model=TINY, context=32, first_rows=(1,), all_rows=(1, 2), rank=2, mixed_ranks=(1, 3),
    gemm_rows=(1, 2), gemm_bytes=1 << 14, matmul=64, copy_bytes=1 << 20, served=TINY,
    cells=(Cell("serve_c4_a2", 4, 2, output_len=4, rounds=1),),
)  # fmt: skip

"""The shapes of models that are measured, and how much is done of everything: on a GPU, and in a dry run on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Decoder:
    """A Llama-shaped decoder; weights are random wherever it is used."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """What its config.json would say, with another number of layers if one is given."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 256,
            "eos_token_id": 256,
            "pad_token_id": 256,
        }

    @property
    def gemms(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Its four linear operations a layer: (K, the N of each part)."""
        kv = self.kv_heads * self.head_dim
        return {
            "q/k/v": (self.hidden, (self.heads * self.head_dim, kv, kv)),
            "o": (self.heads * self.head_dim, (self.hidden,)),
            "gate/up": (self.hidden, (self.inner, self.inner)),
            "down": (self.inner, (self.hidden,)),
        }


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done of everything. Of rows, what matters most comes first: time may run out."""

    device: str
    steps: Decoder
    context: int
    first_rows: tuple[int, ...]
    all_rows: tuple[int, ...]
    rank: int
    mixed_ranks: tuple[int, ...]
    peer_layers: tuple[int, int]  # the two depths between which the peers' time a layer is taken
    gemm_rows: tuple[int, ...]
    gemm_bytes: int  # NF4 copies of an operation are made until they take this much: no cache holds them
    warmups: int
    repeats: int
    copy_bytes: int
    matmul: int
    served: Decoder
    served_requests: tuple[int, ...]
    served_adapters: int
    served_tokens: int


LLAMA_8B = Decoder("Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256)
TINY = Decoder("tiny", 64, 128, 2, 4, 2, 16, 320)
FULL = Scale(
    device="cuda", steps=LLAMA_8B, context=1024, first_rows=(1, 32), all_rows=(1, 32, 8, 64), rank=16,
    mixed_ranks=(8, 16, 32, 64), peer_layers=(1, 3), gemm_rows=(1, 8, 16, 32, 64), gemm_bytes=256 << 20,
    warmups=3, repeats=30, copy_bytes=4 << 30, matmul=8192,
    served=Decoder("Llama-3.2-1B, 4 of 16 layers", 2048, 8192, 4, 32, 8, 64, 32000),
    served_requests=(1, 16, 32), served_adapters=16, served_tokens=64,
)  # fmt: skip
DRY = Scale(
    device="cpu", steps=TINY, context=32, first_rows=(1,), all_rows=(1, 2), rank=2, mixed_ranks=(1, 3),
    peer_layers=(1, 2), gemm_rows=(1, 2), gemm_bytes=1 << 14, warmups=1, repeats=2, copy_bytes=1 << 20, matmul=64,
    served=TINY, served_requests=(1, 4), served_adapters=2, served_tokens=4,
)  # fmt: skip

"""What is left for keys and values on a device, and the sentences when it is too little."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loramux.errors import StartupError
from loramux.model import kv_capacity
from loramux.model.graphs import MEMORY as GRAPHS
from loramux.ops.site import Site
from loramux.values import Memory

MIB = 1 << 20


def model(device: str, **facts: Any) -> Any:
    """A model of 1 MiB of keys and values a block of 16 tokens."""
    return SimpleNamespace(
        device=torch.device(device),
        kv_bytes_per_token=MIB // 16,
        max_context=1024,
        dtype=torch.bfloat16,
        vocab_size=1000,
        sites=(Site(0, "q", 64, 64), Site(1, "gate", 64, 192)),
        can_capture=device == "cuda",
        **facts,
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_capacity, "free_bytes", lambda device: 1000 * MIB)


@pytest.mark.usefixtures("free")
def test_what_is_taken_later_is_left_alone_on_a_gpu() -> None:
    def blocks(device: str, memory: Memory | None, most: int = 10000) -> int:
        return kv_capacity.kv_blocks(model(device), memory, 16, most, adapters=300 * MIB, step=100 * MIB)

    assert blocks("cuda", None) == int(0.85 * 600)
    assert blocks("cuda", Memory(fraction=0.5)) == 300
    assert blocks("cuda", Memory(bytes=600 * MIB)) == 600
    assert blocks("cuda", None, most=70) == 70
    assert blocks("cpu", None) == 100, "a CPU's adapters are not taken from what is free now"
    assert blocks("cpu", Memory(bytes=900 * MIB)) == 900
    assert blocks("cpu", Memory(bytes=2000 * MIB), most=70) == 70
    with pytest.raises(StartupError, match="2000 MiB, of which 1500 MiB could ever be used, are more than"):
        blocks("cpu", Memory(bytes=2000 * MIB), most=1500)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("memory", "adapters", "sentence"),
    [
        (
            None,
            900 * MIB,
            r"cuda: of 1000 MiB that the weights leave, adapters may take 900 MiB \(--adapter-memory\) and a step "
            r"takes 40 MiB \(--max-batch-tokens\); the KV cache of one request of 1024 tokens needs 64 MiB",
        ),
        (None, 2000 * MIB, "adapters may take 2000 MiB"),
        (Memory(bytes=700 * MIB), 300 * MIB, "--kv-memory: 700 MiB are more than the 660 MiB that weights, adapters"),
        (Memory(bytes=63 * MIB), 0, "--kv-memory: 63 MiB hold 1008 tokens, less than one request of 1024 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_figures(memory: Memory | None, adapters: int, sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        kv_capacity.kv_blocks(model("cuda"), memory, 16, 10000, adapters=adapters, step=40 * MIB)


def test_the_bytes_of_a_step() -> None:
    """3 operations' inputs and outputs twice and a dense weight, in 16 bits; logits in 16 bits and thrice in 32."""
    layer = 3 * 2 * (2 * 10 * 256 + 64 * 192)
    assert kv_capacity.step_bytes(model("cuda"), 10, 4) == layer + 4 * 1000 * (2 + 12) + GRAPHS
    assert kv_capacity.step_bytes(model("cpu"), 10, 4) == layer + 4 * 1000 * (2 + 12)

"""The sentence that says what a card gets, for the cards that people have."""

from __future__ import annotations

import pytest
import torch
from loramux.ops import select
from loramux.ops.select import takes_kernels, what_a_card_gets

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CARDS = {
    "NVIDIA A100-SXM4-80GB": (8, 0),
    "NVIDIA GeForce RTX 3090": (8, 6),
    "NVIDIA L4": (8, 9),
    "NVIDIA L40S": (8, 9),
    "NVIDIA GeForce RTX 4090": (8, 9),
    "NVIDIA H100 80GB HBM3": (9, 0),
    "NVIDIA H200": (9, 0),
    "NVIDIA B200": (10, 0),
}
KERNELS = "Triton kernels for NF4, adapters, attention and sampling, decode steps as CUDA graphs"
FALLBACK = "and no CUDA graphs, but torch and bitsandbytes, several times slower"


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", CARDS)
def test_cards_from_8_0_on_get_the_kernels(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_TRIED", frozenset({(9, 0)}))
    major, minor = CARDS[name]
    assert takes_kernels(CARDS[name], dtype)
    card = f"{name} (compute capability {major}.{minor}, {'bfloat16' if dtype == BF16 else 'float16'}): {KERNELS}"
    said = what_a_card_gets(name, CARDS[name], dtype)
    assert said == (card if major == 9 else f"{card}; not tried on such a card yet")


def test_a_t4_has_no_bfloat16_and_falls_back() -> None:
    for dtype in (BF16, FP16, FP32):
        assert not takes_kernels((7, 5), dtype)
    half = what_a_card_gets("Tesla T4", (7, 5), FP16)
    assert half == (
        "Tesla T4 (compute capability 7.5, float16): no Triton kernels (they need compute capability 8.0) "
        f"{FALLBACK}; not tried on such a card yet"
    )
    assert "bfloat16 is emulated here: --dtype fp16 is faster" in what_a_card_gets("Tesla T4", (7, 5), BF16)


def test_float32_and_a_missing_triton_fall_back() -> None:
    said = what_a_card_gets("NVIDIA H100", (9, 0), FP32)
    assert "float32): no Triton kernels (they compute in bfloat16 and float16)" in said
    assert FALLBACK in said
    said = what_a_card_gets("NVIDIA H100", (9, 0), BF16, "No module named 'triton'")
    assert f"no Triton kernels (No module named 'triton') {FALLBACK}" in said

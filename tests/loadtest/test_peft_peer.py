"""The PEFT peer does the work that it is timed for: every row with its own adapter, on NF4 or on dense weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.adapters import write_adapters
from loadtest.peers.peft_peer import PeftPeer, Weights, to_nf4
from loadtest.shapes import linear_shapes

TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=2,
    pad_token_id=0,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers' own, of its own attribute
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY)
    return model.bfloat16()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Strong ones, so that two rows of the same prompt cannot agree by chance."""
    out = tmp_path_factory.mktemp("adapters")
    return write_adapters(out, linear_shapes(TINY.to_dict()), count=3, ranks=[4], strength=3.0)


@pytest.mark.parametrize("weights", ["nf4", "dense"])
def test_every_row_has_its_own_adapter(adapters: list[Path], weights: Weights) -> None:
    """Timing one adapter under the name of three would flatter PEFT."""
    prompt = list(range(3, 11))
    mixed = PeftPeer(base(), adapters, weights).generate([prompt] * 4, 4)
    assert mixed.seconds > 0
    assert mixed.token_ids[0] == mixed.token_ids[3]
    assert len({tuple(ids) for ids in mixed.token_ids}) == 3
    alone = PeftPeer(base(), adapters[1:2], weights).generate([prompt] * 4, 4)
    assert alone.token_ids[0] == mixed.token_ids[1]


def test_lengths_are_exact_though_eos_comes(adapters: list[Path]) -> None:
    """A batch that stops at end-of-sequence does less work than ours and looks faster."""
    model = base()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits equal: greedy takes id 0 unless it is suppressed
    model.generation_config.eos_token_id = 0
    generated = PeftPeer(model, [], "dense").generate([[5, 6, 7]] * 2, 9)
    assert [len(ids) for ids in generated.token_ids] == [9, 9]


def test_nf4_means_every_linear_but_the_head() -> None:
    model = to_nf4(base())
    linears: list[Any] = [
        m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"
    ]
    assert len(linears) == 14
    assert all(isinstance(m, Linear4bit) for m in linears)
    states: list[Any] = [m.weight.quant_state for m in linears]
    assert {(state.nested, state.quant_type) for state in states} == {(True, "nf4")}
    assert type(model.lm_head) is torch.nn.Linear

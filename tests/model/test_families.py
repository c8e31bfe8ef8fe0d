"""Flat driving equals transformers' own generate, family by family; unfit models are refused with their reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loramux.errors import UnsupportedModel
from loramux.model.causal_lm import flat_inputs
from loramux.model.loading import dequantized_model, load_model
from loramux.ops.cpu.backend import NativeBackend
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.model.tiny import FAMILIES, greedy_flat, make_config, save_tiny

PROMPTS = ([5, 17, 99, 3, 42, 8, 77, 23, 64, 11, 90, 31], [7, 7, 12], [101, 44, 55, 66, 13])


def test_the_list_is_the_one_promised() -> None:
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_flat_driving_equals_generate(family: str, tmp_path: Path) -> None:
    folder = str(save_tiny(family, tmp_path))
    oracle = dequantized_model(folder, attention="eager")
    oracle.generation_config.eos_token_id = None
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())
    model = load_model(folder, device="cpu", dtype="fp32").model
    assert greedy_flat(model, PROMPTS, 16) == expected
    assert greedy_flat(model, PROMPTS, 16, chunk=4) == expected
    assert greedy_flat(model, PROMPTS[:1], 16) == expected[:1]


SHAPES: dict[str, dict[str, Any]] = {
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads as heads": {"num_key_value_heads": 4},
    "one head, one layer": {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1},
    # No multiple of an NF4 block, nor of a vector.
    "odd sizes": {"hidden_size": 96, "intermediate_size": 100, "vocab_size": 131, "head_dim": 24},
    "heads wider than the model": {"head_dim": 256, "num_key_value_heads": 1},
}
GPT2_SHAPES = {
    "one head, one layer": {"n_head": 1, "n_layer": 1},
    "odd sizes": {"n_embd": 96, "vocab_size": 131},
}


def shapes() -> list[Any]:
    """Each family with one key/value head and with all; the rest for one of each way through the code."""
    pairs = [(family, shape) for family in FAMILIES if family != "gpt2" for shape in list(SHAPES)[:2]]
    pairs += [(family, shape) for family in ("llama", "gemma3_text") for shape in list(SHAPES)[2:]]
    pairs += [("gpt2", shape) for shape in GPT2_SHAPES]
    return [pytest.param(*pair, id=", ".join(pair)) for pair in pairs]


@pytest.mark.parametrize(("family", "shape"), shapes())
def test_any_number_of_heads(family: str, shape: str, tmp_path: Path) -> None:
    """gemma-3-270m's one key/value head was refused by the native operations: torch gave its dimension of size 1 a
    stride that they took for gaps. Both paths, whole prompts together and a token alone."""
    options = (GPT2_SHAPES if family == "gpt2" else SHAPES)[shape]
    folder = str(save_tiny(family, tmp_path, **({"num_hidden_layers": 2} if family != "gpt2" else {}) | options))
    oracle = dequantized_model(folder, attention="eager")
    expected = torch.cat([oracle(torch.tensor([prompt])).logits[0] for prompt in PROMPTS])
    last = len(PROMPTS[0]) - 1
    for dtype, tolerance in (("fp32", 1e-4), ("bf16", 0.06)):
        model = load_model(folder, device="cpu", dtype=dtype).model
        model.allocate_kv(32, 4)
        together = model.forward(flat_inputs([(prompt, 0) for prompt in PROMPTS], 4)).float()
        assert relative(together, expected) < tolerance, dtype
        alone = model.forward(flat_inputs([(PROMPTS[0], last)], 4)).float()
        assert relative(alone, expected[last : last + 1]) < 2 * tolerance, dtype


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_bfloat16_follows_the_oracle(family: str, tmp_path: Path) -> None:
    """These families run as one native call where there is one; fp32 above never does."""
    folder = str(save_tiny(family, tmp_path))
    oracle = dequantized_model(folder, attention="eager")
    model = load_model(folder, device="cpu", dtype="bf16").model
    got = model.forward(flat_inputs([(prompt, 0) for prompt in PROMPTS], 4)).float()
    expected = torch.cat([oracle(torch.tensor([prompt])).logits[0] for prompt in PROMPTS])
    assert (got - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_shortcut_changes_no_bit(family: str, tmp_path: Path) -> None:
    model = load_model(str(save_tiny(family, tmp_path)), device="cpu", dtype="bf16").model
    inputs = flat_inputs([(PROMPTS[0], 0), (PROMPTS[1] * 70, 0)], 4, logits="last")  # far positions, too
    model.allocate_kv(256, 4)
    assert isinstance(model.backend, NativeBackend) == (model.shortcut is not None)
    short = model.forward(inputs)
    model.shortcut = None
    assert torch.equal(short, model.forward(inputs))


def test_a_step_of_prompt_chunks_needs_no_logits(tmp_path: Path) -> None:
    """A chunk that ends before its prompt does wants none, and a batch of nothing else failed as a whole."""
    for dtype in ("fp32", "bf16"):
        model = load_model(str(save_tiny("llama", tmp_path / dtype)), device="cpu", dtype=dtype).model
        inputs = flat_inputs([(PROMPTS[0], 0)], 4)
        assert model.forward(replace(inputs, logits_rows=inputs.logits_rows[:0])).shape == (0, model.vocab_size)


def test_sliding_window_matters(tmp_path: Path) -> None:
    """The windows above must be narrow enough to change answers, or the test proves nothing about them."""
    windowed = load_model(str(save_tiny("mistral", tmp_path / "a")), dtype="fp32").model
    full = load_model(str(save_tiny("mistral", tmp_path / "b", sliding_window=None)), dtype="fp32").model
    assert greedy_flat(windowed, PROMPTS, 16) != greedy_flat(full, PROMPTS, 16)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        (
            "falcon",
            {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 128},
            "attention",
        ),
        ("bloom", {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128}, "attention"),
    ],
)
def test_models_that_ignore_the_attention_interface_are_refused(
    family: str, options: dict[str, int], reason: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**options))
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        load_model(str(tmp_path), dtype="fp32", max_context=64)
    assert str(tmp_path) in str(caught.value) or family in str(caught.value)


def test_longrope_is_refused_because_answers_would_depend_on_neighbours(tmp_path: Path) -> None:
    factors = [1.0] * 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
    }
    save_tiny("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=128)
    with pytest.raises(UnsupportedModel, match="longrope"):
        load_model(str(tmp_path), dtype="fp32")


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    config = make_config("mixtral", num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="mixture-of-experts"):
        load_model(str(tmp_path), dtype="fp32")

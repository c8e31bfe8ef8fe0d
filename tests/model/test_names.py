"""Weights are found under whatever names a checkpoint has for them, and a language model beside other towers is served
alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loramux.errors import UnsupportedModel
from loramux.model.causal_lm import flat_inputs
from loramux.model.checkpoint import write_checkpoint
from loramux.model.loading import dequantized_model, load_model
from loramux.model.sources import open_source
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

from tests.model.tiny import COMMON, save_tiny

IDS = [5, 17, 99, 3, 42, 8]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = COMMON | {"num_hidden_layers": 2, "num_key_value_heads": 1}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
COMPOSITES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | WINDOWED | {"model_type": "gemma3_text"},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": TEXT
        | WINDOWED
        | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "global_head_dim": 32},
        "vision_config": VISION | {"head_dim": 16, "num_key_value_heads": 2},
        "audio_config": None,
    },
    "mistral3": {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": VISION | {"model_type": "pixtral"}},
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    },
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of a checkpoint other names."""
    save_file({change(k): v for k, v in tensors(folder).items()}, folder / "model.safetensors", {"format": "pt"})


def logits(folder: Path) -> torch.Tensor:
    return load_model(str(folder), dtype="fp32").model.forward(flat_inputs([(IDS, 0)], 4))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_gpt_neox_by_its_old_and_its_new_name_for_the_head(tmp_path: Path) -> None:
    """transformers calls it lm_head now and writes embed_out still; both are on the hub."""
    folder = save_tiny("gpt_neox", tmp_path, num_hidden_layers=2)
    names = set(tensors(folder))
    assert len(names & {"embed_out.weight", "lm_head.weight"}) == 1
    expected = dequantized_model(str(folder))(torch.tensor([IDS])).logits[0]
    first = logits(folder)
    assert relative(first, expected) < 1e-4
    other = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "embed_out.weight"}
    rename(folder, lambda key: other.get(key, key))
    assert set(tensors(folder)) != names
    assert torch.equal(logits(folder), first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_base_model_without_prefix(family: str, tmp_path: Path) -> None:
    options = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    folder = save_tiny(family, tmp_path, **options)
    expected = logits(folder)
    prefix = {"llama": "model.", "gpt2": "transformer.", "gpt_neox": "gpt_neox."}[family]
    rename(folder, lambda key: key.removeprefix(prefix))
    assert torch.equal(logits(folder), expected)


def save_composite(family: str, folder: Path) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**COMPOSITES[family])
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", COMPOSITES)
def test_a_checkpoint_with_other_towers_is_served_as_its_language_model(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = save_composite(family, tmp_path)
    caplog.set_level(logging.INFO, "loramux")
    got = logits(tmp_path)
    assert "vision" in caplog.text
    # The whole model, text only, on the same dequantized weights.
    alone = dequantized_model(str(tmp_path))
    whole.model.language_model.load_state_dict(alone.model.state_dict())
    if not whole.config.tie_word_embeddings:
        whole.lm_head.load_state_dict(alone.lm_head.state_dict())
    with torch.no_grad():
        expected = whole(torch.tensor([IDS])).logits[0]
    assert relative(got, expected) < 1e-4


@pytest.mark.parametrize(
    ("form", "change"),
    [
        # What transformers ≤ 4.51, ≥ 4.52 and 5.10 to 5.23 wrote.
        ("old", lambda key: key),
        ("new", lambda key: "model." + key.replace("language_model.model.", "language_model.", 1)),
        ("doubled", lambda key: "model." + key if key.startswith("language_model.") else key),
    ],
)
def test_every_layout_of_a_tower(form: str, change: Callable[[str], str], tmp_path: Path) -> None:
    save_composite("gemma3", tmp_path)
    assert any(key.startswith("language_model.model.layers") for key in tensors(tmp_path))
    expected = logits(tmp_path)
    rename(tmp_path, change)
    assert torch.equal(logits(tmp_path), expected), form


def test_a_head_of_its_own_beside_the_tower(tmp_path: Path) -> None:
    """The composite's config says whether the head is tied; the language model's own, alone, says otherwise."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gemma3"](**COMPOSITES["gemma3"], tie_word_embeddings=False)
    AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    assert any(key.endswith("lm_head.weight") for key in tensors(tmp_path))
    model = load_model(str(tmp_path), dtype="fp32").model
    expected = dequantized_model(str(tmp_path))(torch.tensor([IDS])).logits[0]
    assert relative(model.forward(flat_inputs([(IDS, 0)], 4)), expected) < 1e-4
    head = next(v for k, v in tensors(tmp_path).items() if k.endswith("lm_head.weight"))
    assert torch.equal(dequantized_model(str(tmp_path)).get_output_embeddings().weight, head)


def test_quantizing_one_writes_the_language_model(tmp_path: Path) -> None:
    save_composite("gemma3", tmp_path / "whole")
    (tmp_path / "nf4").mkdir()
    for _ in write_checkpoint(open_source(str(tmp_path / "whole")), tmp_path / "nf4", torch.float32):
        pass
    assert not any("vision" in key for key in tensors(tmp_path / "nf4"))
    assert torch.equal(logits(tmp_path / "nf4"), logits(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        (
            "qwen2_5_vl",
            {
                "text_config": TEXT | MROPE,
                "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
            },
            "no causal language model",
        ),
        (
            "paligemma",
            {
                "text_config": TEXT | {"model_type": "gemma"},
                "vision_config": VISION | {"model_type": "siglip_vision_model"},
            },
            "whole prompt",
        ),
    ],
)
def test_a_language_model_that_cannot_stand_alone_is_refused(
    family: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    CONFIG_MAPPING[family](**options).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        load_model(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))


def test_embeddings_that_the_config_ties_and_the_file_does_not(tmp_path: Path) -> None:
    """transformers believes the file; the head was dropped in silence here."""
    folder = save_tiny("llama", tmp_path, num_hidden_layers=1)
    held = tensors(folder)
    assert "lm_head.weight" not in held
    head = torch.randn(held["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(1))
    save_file(held | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, head)
    oracle = dequantized_model(str(folder))
    assert torch.equal(oracle.lm_head.weight, head)
    assert relative(logits(folder), oracle(torch.tensor([IDS])).logits[0]) < 1e-4
    save_file(held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert dequantized_model(str(folder)).config.tie_word_embeddings

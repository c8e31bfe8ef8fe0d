"""What is told of a model from its config alone is what the server finds once it has loaded it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from loramux.errors import StartupError, UnsupportedModel
from loramux.model.causal_lm import CausalLM
from loramux.model.loading import load_model
from loramux.model.outline import Outline, outline
from loramux.ops.cuda.backend import TritonBackend
from loramux.ops.nf4 import NF4Weight

from tests.model.tiny import FAMILIES, save_tiny
from tests.ops.triton_device import DEVICE

ODD = {"hidden_size": 96, "intermediate_size": 100, "vocab_size": 131, "head_dim": 24}


@pytest.mark.parametrize(
    ("family", "shape"),
    [*((family, {}) for family in FAMILIES), ("llama", ODD), ("gemma3_text", ODD), ("llama", {"attention_bias": True})],
)
def test_sizes_are_those_of_the_loaded_model(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    folder = str(save_tiny(family, tmp_path, **shape))
    loaded = load_model(folder, device="cpu", dtype="fp32", max_context=100).model
    told = outline(folder, dtype="fp32", max_context=100)
    assert sizes(told) == sizes(loaded)
    assert outline(str(tmp_path / "config.json"), max_context=100).sites == told.sites


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sizes_are_those_of_the_gpu_s_kernels(family: str, tmp_path: Path) -> None:
    """They pad the outputs of a layer to 64, which real models' are multiples of."""
    folder = str(save_tiny(family, tmp_path, num_hidden_layers=1, num_key_value_heads=4))
    loaded = load_model(folder, device=DEVICE.type, backend=TritonBackend(DEVICE)).model
    told = outline(folder)
    assert sizes(told) == sizes(loaded)
    assert told.can_capture == (loaded.shortcut is not None)


def sizes(model: CausalLM | Outline) -> dict[str, object]:
    facts = asdict(model.facts)
    for of_the_machine in ("device", "backend"):
        del facts[of_the_machine]
    return facts | {"kv": model.kv_bytes_per_token, "sites": model.sites, "dtype": model.dtype}


@pytest.mark.parametrize("shape", [(64, 64), (131, 100), (1, 3), (300, 4096)])
def test_an_empty_nf4_weight_takes_what_a_quantized_one_does(shape: tuple[int, int]) -> None:
    quantized = NF4Weight.quantize(torch.randn(shape))
    empty = NF4Weight.empty(shape, torch.device("cpu"))
    for part in ("codes", "absmax", "table", "nested_absmax", "nested_table", "offset"):
        expected, got = getattr(quantized, part), getattr(empty, part)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), part
    assert NF4Weight.empty(shape, torch.device("cpu"), double=False).absmax.numel() == quantized.absmax.numel()


def test_graphs_are_for_models_whose_steps_can_be_captured() -> None:
    def can(family: str, dtype: str = "auto") -> bool:
        return outline(str(CONFIGS / f"{family}.json"), dtype=dtype).can_capture

    assert can("llama-3-8b")
    assert not can("llama-3-8b", "fp32"), "no Triton kernels"
    assert not can("qwen3-32b"), "its layers run transformers' own code"


CONFIGS = Path(__file__).parent.parent / "fixtures" / "configs"


def with_config(tmp_path: Path, **changes: Any) -> str:
    config = json.loads((CONFIGS / "llama-3.2-1b.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | changes))
    return str(file)


def test_a_checkpoint_that_is_quantized_once_stays_so(tmp_path: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    once = outline(with_config(tmp_path, quantization_config=stored))
    assert once.facts.bits_per_weight == pytest.approx(4.5)
    twice = outline(with_config(tmp_path, quantization_config=stored | {"bnb_4bit_use_double_quant": True}))
    assert twice.facts.bits_per_weight == pytest.approx(4.127, abs=1e-3)


def test_a_merged_folder_is_dense(tmp_path: Path) -> None:
    file = with_config(tmp_path)
    quantized = outline(file).facts
    (tmp_path / "merge_report.json").write_text("{}")
    merged = outline(str(tmp_path)).facts
    assert (merged.nf4_bytes, merged.parameters) == (0, quantized.parameters)
    assert merged.dense_bytes == 2 * merged.parameters


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "falcon_of_tomorrow"}, "config.json: transformers cannot read config.json"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the checkpoint is quantized with gptq"),
        ({"hidden_size": "wide"}, "config.json: transformers cannot read"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "looks at the longest position of the whole batch"),
    ],
)
def test_what_is_not_served_is_not_planned(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=sentence):
        outline(with_config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("family", "sentence"),
    [("t5", "encoder-decoder"), ("bloom", "in 0 of 2 layers"), ("falcon", "list of its own"), ("mixtral", "mixture")],
)
def test_families_that_are_not_served_are_not_planned(family: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": family, "num_hidden_layers": 2, "hidden_size": 64, "n_head": 4}))
    with pytest.raises(UnsupportedModel, match=sentence):
        outline(str(file), max_context=64)

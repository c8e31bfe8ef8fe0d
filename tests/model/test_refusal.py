"""Whatever is wrong with a model, loading it ends with one sentence that names it, and never with a traceback."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loramux.errors import DeviceLost, StartupError, UnsupportedModel
from loramux.model import loading
from loramux.model.loading import load_model
from loramux.model.sources import open_source
from loramux.ops.grouped import GroupedBackend
from transformers.models.llama import modeling_llama

from tests.model.tiny import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("base"), num_hidden_layers=1)


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(StartupError) as caught:
        load_model(str(folder), **({"dtype": "fp32", "device": "cpu"} | options))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(folder))
    assert len(text) < len(str(folder)) * 2 + 450
    return text


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "sixty-four"},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2},
        {"hidden_size": 63},
        {"head_dim": 15},
        {"head_dim": 0},
        {"vocab_size": -1},
        {"vocab_size": 5},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"rope_parameters": 7},
        {"hidden_act": "nope"},
        {"model_type": "never-heard-of"},
        {"eos_token_id": {"a": 1}},
        {"max_position_embeddings": -5},
        {"rms_norm_eps": float("nan")},
        {"quantization_config": 7},
        {"text_config": {}},
        {"layer_types": ["bogus"]},
        {"attention_bias": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_config_that_describes_no_model(change: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """transformers raises what it likes for these: its own types of error, ZeroDivisionError, AttributeError …"""
    folder = shutil.copytree(base, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(folder)


@pytest.mark.parametrize("content", ["[]", "{", "7", "", "null"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
)
def test_a_file_that_holds_something_else(name: str, content: str, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / name).write_text(content)
    assert name.split(".")[0] in refused(folder)


def test_what_the_modeling_code_raises_while_it_is_driven(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The pass that looks at the layers before they are fused ended in a traceback."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a shape\nthat is " + "very " * 200 + "wrong")

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", broken)
    caplog.set_level(logging.DEBUG, "loramux")
    for dtype in ("fp32", "bf16"):
        text = refused(base, dtype=dtype)
        assert "LlamaForCausalLM" in text
        assert "RuntimeError: a shape that is very" in text
        assert "…" in text
    assert "apply_rotary_pos_emb" in caplog.text, "the traceback is in the log at debug level"


@pytest.mark.parametrize("stage", ["place_sites", "connect", "fuse", "prove_flat", "parameters", "Tokenizer"])
@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), KeyError("x"), ImportError("no module"), ValueError()])
def test_an_exception_that_nobody_foresaw(
    stage: str, error: Exception, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    source = open_source(str(base))
    source.tokenizer = object()
    monkeypatch.setattr(loading, stage, failing)
    with pytest.raises(UnsupportedModel, match=type(error).__name__) as caught:
        load_model(source, dtype="fp32", device="cpu", backend=GroupedBackend())
    assert str(caught.value).startswith(str(base))
    assert "\n" not in str(caught.value)


def test_heads_that_cannot_be_shared_evenly(tmp_path: Path) -> None:
    """3 heads on 2 key/value heads: kernels that divide would leave the third without an answer."""
    folder = save_tiny(
        "llama", tmp_path, hidden_size=48, num_attention_heads=3, num_key_value_heads=2, num_hidden_layers=1
    )
    for dtype in ("fp32", "bf16"):
        assert "3 attention heads cannot share 2 key/value heads" in refused(folder, dtype=dtype)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("tried to allocate"), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_out_of_memory_in_the_self_test_is_told_as_that(
    base: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(loading, "prove_flat", full)
    assert "ran out of memory" in refused(base)


@pytest.mark.parametrize("stage", ["fill", "prove_flat"])
def test_a_device_that_fails_is_no_fault_of_the_model(base: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """It was told as one, with the exit status that no supervisor tries again after."""

    def lost(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(loading, stage, lost)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        load_model(str(base), dtype="fp32", device="cpu")


def test_logits_that_are_not_finite(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were said to come from code that mixes sequences, since NaN is unlike itself."""
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: x * float("inf"))
    assert "finite" in refused(base)

"""Random adapters: what PEFT and safetensors read back, and that the same seed gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.adapters import AdapterSpec, random_weights, to_bf16, write_adapters
from loadtest.shapes import SHAPES, Linear, linear_shapes, read_config, select_targets

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def tiny_linears() -> list[Linear]:
    return linear_shapes(TINY.to_dict())


def test_shapes_are_those_of_the_real_model() -> None:
    """head_dim is not hidden_size / heads everywhere (here 24 / 4 ≠ 8): q_proj would get the wrong size."""
    model = LlamaForCausalLM(TINY)
    real = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert {path: (inputs, outputs) for path, inputs, outputs in tiny_linears()} == real


def test_smollm2_has_the_published_number_of_weights() -> None:
    linears = linear_shapes(SHAPES["smollm2"])
    assert len(linears) == 210
    assert sum(inputs * outputs for _, inputs, outputs in linears) == 106_168_320


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"model_type": "phi3"}, {}])
def test_unknown_layouts_are_refused_by_name(config: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="model_type"):
        linear_shapes(config)


def test_peft_loads_it_and_it_changes_the_output(tmp_path: Path) -> None:
    folders = write_adapters(tmp_path, tiny_linears(), count=2, ranks=[4, 3])
    torch.manual_seed(0)
    base = LlamaForCausalLM(TINY).eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.inference_mode():
        plain = base(ids).logits
        model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="0").eval()
        model.load_adapter(str(folders[1]), adapter_name="1")
        first = model(ids).logits
        model.set_adapter("1")
        second = model(ids).logits
    for one, other in ((plain, first), (plain, second), (first, second)):
        assert (one - other).abs().max() > 1e-3
    assert first.isfinite().all()
    assert second.isfinite().all()


def test_every_tensor_is_there_with_its_rank(tmp_path: Path) -> None:
    (folder,) = write_adapters(tmp_path, tiny_linears(), count=1, ranks=[5], scale=1.5)
    tensors = load_file(folder / "adapter_model.safetensors")
    for path, inputs, outputs in tiny_linears():
        a = tensors.pop(f"base_model.model.{path}.lora_A.weight")
        b = tensors.pop(f"base_model.model.{path}.lora_B.weight")
        assert (a.shape, b.shape) == ((5, inputs), (outputs, 5))
        assert a.dtype == b.dtype == torch.bfloat16
        assert b.abs().max() > 0
    assert not tensors
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 7.5)


def test_ranks_are_taken_in_turn_and_targets_kept(tmp_path: Path) -> None:
    linears = select_targets(tiny_linears(), "q_proj, v_proj")
    folders = write_adapters(tmp_path, linears, count=3, ranks=[2, 6])
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert [config["r"] for config in configs] == [2, 6, 2]
    assert configs[0]["target_modules"] == ["q_proj", "v_proj"]
    assert len(load_file(folders[0] / "adapter_model.safetensors")) == 8


def test_targets_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="'w_proj'"):
        select_targets(tiny_linears(), "q_proj,w_proj")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def weights(out: str, seed: int) -> list[bytes]:
        folders = write_adapters(tmp_path / out, tiny_linears(), count=2, ranks=[2], seed=seed)
        return [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]

    assert weights("one", 1) == weights("again", 1)
    assert len({*weights("one", 1), *weights("two", 2)}) == 4


def test_the_branch_has_the_strength_asked_for_whatever_the_rank() -> None:
    """With a fixed deviation of B, rank 64 would drown the base where rank 1 is not seen."""
    linear = Linear("model.layers.0.mlp.up_proj", 512, 512)
    x = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    for rank in (1, 16, 200):
        spec = AdapterSpec(rank=rank, seed=rank, scale=2.0, strength=0.1)
        a, b = (
            torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
            for bits in random_weights([linear], spec).values()
        )
        assert np.sqrt(np.mean((2.0 * x @ a.T @ b.T) ** 2)) == pytest.approx(0.1, rel=0.5 if rank == 1 else 0.2)


def test_bf16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:3] = [1.00390625, 1.01171875, 0.0]  # two ties and a zero
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (to_bf16(values) == expected).all()


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": 1, "scale": 0.0}, {"rank": 1, "strength": float("nan")}])
def test_impossible_adapters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        AdapterSpec(seed=0, **wrong)  # type: ignore[arg-type]


def test_configs_come_from_names_folders_and_files(tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path)
    assert read_config("smollm2")["hidden_size"] == 576
    assert read_config(str(tmp_path))["hidden_size"] == 24
    assert read_config(str(tmp_path / "config.json"))["hidden_size"] == 24
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_config(str(tmp_path / "nowhere"))

"""NF4 checkpoints interchange with transformers + bitsandbytes, both ways; sources that cannot be read say why."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from loramux.errors import StartupError, UnsupportedModel
from loramux.model import sources
from loramux.model.causal_lm import flat_inputs
from loramux.model.checkpoint import write_checkpoint
from loramux.model.loading import dequantized_model, load_model
from loramux.model.sources import FolderSource, open_source
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.model.tiny import save_tiny

IDS = [5, 17, 99, 3, 42, 8]
QUANTIZATION = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def logits(folder: Path) -> torch.Tensor:
    model = load_model(str(folder), dtype="fp32").model
    return model.forward(flat_inputs([(IDS, 0)], 4))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_checkpoint_loads_in_transformers_and_here(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense")
    out = tmp_path / "nf4"
    out.mkdir()
    progress = list(write_checkpoint(FolderSource(source, "tiny"), out, torch.float32))
    assert progress[-1][0] == progress[-1][1] == len(progress)
    ours = logits(source)
    assert torch.equal(logits(out), ours), "a checkpoint must hold the very weights that loading quantizes to"
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    layer = theirs.get_submodule(
        "model.layers.0.self_attn.q_proj" if family == "llama" else "transformer.h.0.attn.c_attn"
    )
    assert type(layer).__name__ == "Linear4bit"
    # Linear4bit computes on the CPU in its own way (see DESIGN §3), so its weights are compared, not its answers.
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    name = "model.layers.0.self_attn.q_proj" if family == "llama" else "transformer.h.0.attn.c_attn"
    expected = dequantized_model(str(source)).get_parameter(name + ".weight")
    assert torch.equal(weight.float(), (expected.T if family == "gpt2" else expected).to(weight.dtype).float())


def test_a_file_is_opened_twice_for_a_quantized_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each opening reads the header: with one for each entry of such a weight, loading took half as long again."""
    source = FolderSource(save_tiny("llama", tmp_path / "dense"), "tiny")
    out = tmp_path / "nf4"
    out.mkdir()
    weights = len(list(write_checkpoint(source, out, torch.float32)))
    opened: list[Path] = []
    original = sources.safe_open

    def counting(path: Path, framework: str) -> object:
        opened.append(path)
        return original(path, framework=framework)

    monkeypatch.setattr(sources, "safe_open", counting)
    load_model(FolderSource(out, "tiny"), dtype="fp32")
    assert len(opened) <= 1 + 2 * weights, "one for the index"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_their_checkpoint_loads_here(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=QUANTIZATION, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "nf4")
    assert torch.equal(logits(tmp_path / "nf4"), logits(source))


def test_double_quantization_is_kept_at_rest(tmp_path: Path) -> None:
    """One byte for each block of 64: undoing it in memory would cost 0.37 bits more per weight."""
    config = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    facts = load_model(str(save_tiny("llama", tmp_path, **config)), dtype="fp32").model.facts
    assert facts.bits_per_weight == pytest.approx(4.127, abs=0.003)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(StartupError, match="pickle"):
        open_source(str(tmp_path))


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path))


def test_nan_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"up_proj.*NaN"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "nothing-of-that-name", "/nowhere/at/all"])
def test_unknown_source_tells_the_way_out(name: str) -> None:
    with pytest.raises(StartupError, match="smollm2"):
        open_source(name)


@pytest.mark.parametrize(("wanted", "served"), [(None, 256), (100, 100), (10_000, 256)])
def test_the_context_is_never_longer_than_the_model_was_made_for(
    wanted: int | None, served: int, tmp_path: Path
) -> None:
    assert load_model(str(save_tiny("llama", tmp_path)), max_context=wanted).model.max_context == served


def test_weights_stream_through_memory_one_at_a_time(tmp_path: Path) -> None:
    """A loader that gathers a state dict first needs the dense model beside the NF4 one."""
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watched(FolderSource):
        def get_all(self, keys: Collection[str]) -> dict[str, torch.Tensor]:
            assert sum(t() is not None for t in alive) <= 1, f"earlier tensors still alive when {keys} are read"
            tensors = super().get_all(keys)
            alive.extend(map(weakref.ref, tensors.values()))
            return tensors

    load_model(Watched(save_tiny("llama", tmp_path), "tiny"), dtype="bf16")
    assert len(alive) > 20

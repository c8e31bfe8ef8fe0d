"""No file of a model makes this program run code, ask whether to, or look elsewhere than was said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
from loramux.errors import StartupError
from loramux.model.loading import load_model
from loramux.model.sources import FolderSource, GgufSource, open_source
from loramux.quantize import quantize_to
from transformers import AutoModel, AutoModelForCausalLM

from tests.model.tiny import save_tiny

CODE = "own_code"
MAP = {
    "AutoConfig": f"{CODE}.Own",
    "AutoModelForCausalLM": f"{CODE}.Own",
    "AutoModel": f"{CODE}.Own",
    "AutoTokenizer": [None, f"{CODE}.Own"],
}


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(question: str = "") -> NoReturn:
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr("builtins.input", asked)


def edit(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def with_code(folder: Path) -> Path:
    """Puts Python code into the folder; returns the file that it would write if it ran."""
    marker = folder / "ran"
    folder.mkdir(exist_ok=True)
    (folder / f"{CODE}.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n"
        "class Own(PretrainedConfig):\n    model_type = 'own'\n"
    )
    return marker


def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "a.safetensors")
    with pytest.raises(StartupError, match=r"a\.safetensors is not a regular file"):
        open_source(str(tmp_path / "model"))


def test_an_architecture_of_the_folders_own_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    marker = with_code(folder)
    edit(folder / "config.json", model_type="own", auto_map=MAP)
    for use in (
        lambda: quantize_to(str(folder), tmp_path / "out", lambda done, total: None),
        lambda: open_source(str(folder)),
    ):
        with pytest.raises(StartupError, match=r"code of the folder's own .* never runs"):
            use()
    assert not marker.exists()


def test_a_tokenizer_of_the_folders_own_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    marker = with_code(folder)
    edit(folder / "tokenizer_config.json", auto_map=MAP, tokenizer_class="OwnTokenizer")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match="cannot read the tokenizer"):
        open_source(str(folder))
    assert not marker.exists()


def test_a_known_architecture_is_served_with_transformers_own_code(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    marker = with_code(folder)
    edit(folder / "config.json", auto_map=MAP)
    edit(folder / "generation_config.json", auto_map=MAP, custom_generate=CODE)
    assert load_model(str(folder), device="cpu", dtype="fp32").model.facts.architecture == "LlamaForCausalLM"
    quantize_to(str(folder), tmp_path / "out", lambda done, total: None)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not marker.exists()


def test_transformers_itself_does_not_ask_for_a_part_of_a_model(tmp_path: Path) -> None:
    """Modeling code makes the parts of a model with AutoModel.from_config, where no argument of ours arrives."""
    marker = with_code(tmp_path / "model")
    config = FolderSource(save_tiny("llama", tmp_path / "tiny"), "tiny").config
    config.auto_map = {"AutoModel": f"{tmp_path / 'model'}--{CODE}.Own"}
    config.__class__ = type("Unknown", (type(config),), {})  # no class of transformers' belongs to it
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_config(config)
    assert not marker.exists()


def test_attention_code_from_a_hub_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError(f"fetched: {args}")

    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", fetched)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched)
    folder = save_tiny("llama", tmp_path / "model")
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        edit(folder / "config.json", **{key: "kernels-community/flash-attn2"})
    load_model(str(folder), device="cpu", dtype="fp32")


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": ["x"]},
        {"quantization_config": {"quant_method": "own", "modules": [f"{CODE}.Own"]}},
        {"model_type": ["llama"]},
        {"num_hidden_layers": "three"},
        {"auto_map": 7},
    ],
)
def test_a_config_that_makes_no_sense_is_one_sentence(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    edit(folder / "config.json", **fields)
    with pytest.raises(StartupError):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_file_is_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(StartupError, match=r"config|index"):
        open_source(str(folder))


def test_of_a_gguf_files_neighbours_none_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter_config.json beside it made transformers load the base that it names, from the hub if need be."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    edit(tmp_path / "adapter_config.json", base_model_name_or_path="own/other")
    edit(tmp_path / "config.json", model_type="own", auto_map=MAP)
    seen: list[list[str]] = []

    def from_pretrained(folder: Path, **options: Any) -> NoReturn:
        assert options["trust_remote_code"] is False
        assert (folder / "model.gguf").read_bytes() == b"GGUF"
        seen.append([path.name for path in folder.iterdir()])
        raise ValueError("that is all that was asked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(StartupError, match="all that was asked"):
        GgufSource(tmp_path / "model.gguf", "x")
    assert seen == [["model.gguf"]]


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(StartupError, match="is a pickle, which loramux never opens"):
        open_source(str(folder))

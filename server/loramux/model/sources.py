"""Where a base model comes from: a Hugging Face folder or hub id, a GGUF file, or an embedded default.

safetensors only: pickled checkpoints are refused, since reading one runs code of its author's choosing. For the same
reason no Python file of a model's is ever run, nor is anybody asked whether to; and what a folder says of other
repositories is not followed.
"""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    dynamic_module_utils,
)
from transformers.utils import logging as transformers_logging

from loramux.errors import StartupError
from loramux.merge_report import MERGE_REPORT
from loramux.model.embedded import EMBEDDED, ensure_embedded
from loramux.model.place import local_place, names
from loramux.model.refusal import refusing
from loramux.model.towers import language_config

# With 0 transformers refuses where it would ask on the terminal whether to run a folder's code: also where its own
# modeling code looks up a part of a model, and no argument of ours arrives.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
_NO_CODE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


class TensorSource(ABC):
    """A checkpoint whose tensors are read one by one."""

    name: str
    place: str  # what opens the same again: `name`, but of a hub's model the folder with the commit that was opened
    config: PretrainedConfig
    generation_config: GenerationConfig | None
    tokenizer: object | None
    towers: bool = False  # whether the checkpoint has other towers beside the language model that `config` describes
    merged: bool = False  # written by a merge: its linear layers stay dense, since NF4 would erase the delta

    @abstractmethod
    def keys(self) -> Iterable[str]:
        """All tensor names."""

    @abstractmethod
    def get(self, key: str) -> Tensor:
        """One tensor on the CPU, as stored."""

    def get_all(self, keys: Collection[str]) -> dict[str, Tensor]:
        """Several, where they are wanted together."""
        return {key: self.get(key) for key in keys}

    def companions(self, key: str) -> list[str]:
        """Names of the tensors that describe the quantized tensor `key`."""
        return [k for k in self.keys() if k.startswith(key + ".")]


class FolderSource(TensorSource):
    """config.json and *.safetensors in a folder, dense or NF4 as bitsandbytes writes it."""

    def __init__(self, folder: Path, name: str, place: str | None = None) -> None:
        self.name = name
        self.place = place or name
        if not (folder / "config.json").is_file():
            raise StartupError(f"{name}: there is no config.json in {folder}; is it a Hugging Face model folder?")
        config = read_config(folder / "config.json", name)
        self.config = language_config(config)
        self.towers = self.config is not config
        self.generation_config = _generation_config(folder)
        self.tokenizer = _tokenizer(folder, None)
        self.merged = (folder / MERGE_REPORT).is_file()
        self._files = self._index(folder)
        self._companions: dict[str, list[str]] = {}
        for key in self._files:
            parent, found, _ = key.partition(".weight.")
            if found:
                self._companions.setdefault(parent + ".weight", []).append(key)

    def _index(self, folder: Path) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if path.name.startswith("adapter_"):
                continue
            if not path.is_file():  # a pipe would be waited for
                raise StartupError(f"{self.name}: {path.name} is not a regular file, nor a link to one")
            try:
                with safe_open(path, framework="pt") as opened:
                    files.update(dict.fromkeys(opened.keys(), path))
            except (SafetensorError, OSError) as error:
                raise StartupError(
                    f"{self.name}: {path.name} is not a readable safetensors file: {error}; if it was "
                    "downloaded, fetch it again"
                ) from error
        if not files:
            pickled = [p.name for p in folder.glob("*.bin")]
            hint = (
                f"; {pickled[0]} is a pickle, which loramux never opens: convert it to safetensors with transformers "
                "(from_pretrained, then save_pretrained)"
                if pickled
                else ""
            )
            raise StartupError(f"{self.name}: no .safetensors file in {folder}{hint}")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            with refusing(f"{self.name}: {index.name} is not an index of tensors", StartupError):
                listed = set(json.loads(index.read_text())["weight_map"])
            if missing := sorted(listed - set(files)):
                raise StartupError(f"{self.name}: {len(missing)} tensors of the index are missing, e.g. {missing[0]}")
        return files

    def keys(self) -> Iterable[str]:
        return self._files.keys()

    def get(self, key: str) -> Tensor:
        return self.get_all([key])[key]

    def get_all(self, keys: Collection[str]) -> dict[str, Tensor]:
        # Opened each time: the mapping, and with it the pages read, goes when the tensors do. Opening reads the whole
        # header, so what is wanted together is asked for together.
        with ExitStack() as stack:
            opened = {
                path: stack.enter_context(safe_open(path, framework="pt")) for path in {self._files[k] for k in keys}
            }
            return {key: opened[self._files[key]].get_tensor(key) for key in keys}

    def companions(self, key: str) -> list[str]:
        return self._companions.get(key, [])


class GgufSource(TensorSource):
    """A GGUF file, dequantized by transformers. The whole dense model passes through memory once."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = self.place = name
        try:
            from transformers import GgufConfig
        except ImportError:  # before 5.20 the file name alone asked for dequantization
            options = {}
        else:
            options = {"quantization_config": GgufConfig(dequantize=True)}
        with _alone(path) as folder:
            with refusing(f"{name}: transformers cannot read this GGUF file", StartupError):
                model = AutoModelForCausalLM.from_pretrained(
                    folder, gguf_file=path.name, dtype=torch.float32, **options, **_NO_CODE
                )
            self.tokenizer = _tokenizer(folder, path.name)
        self.config = model.config
        self.generation_config = model.generation_config
        self._tensors: dict[str, Tensor] = dict(model.state_dict())

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get(self, key: str) -> Tensor:
        return self._tensors[key]


def open_source(model: str, *, revision: str | None = None) -> TensorSource:
    """Open what `--model` names. Raises StartupError with the way out if it cannot be found or read."""
    transformers_logging.disable_progress_bar()
    if model in EMBEDDED:
        return FolderSource(ensure_embedded(model, convert_gguf), model)
    place = local_place(model)
    if place is None:
        folder = _download(model, revision)
        return FolderSource(folder, model, str(folder))
    return GgufSource(place, model) if place.is_file() else FolderSource(place, model)


def read_config(file: Path, name: str) -> PretrainedConfig:
    """A model's config.json, by whatever name it goes. Raises StartupError, naming the model, if it is none or names a
    quantization that is not read."""
    with refusing(f"{name}: transformers cannot read {file.name}", StartupError):
        config: PretrainedConfig = AutoConfig.from_pretrained(file, **_NO_CODE)
    _forget_code(config)
    _check_quantization(name, getattr(config, "quantization_config", None))
    return config


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write a GGUF file as an NF4 checkpoint folder."""
    from loramux.model.checkpoint import write_checkpoint

    for _ in write_checkpoint(GgufSource(gguf, gguf.name), out):
        pass


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StartupError(
            f"{model}: could not be fetched from the hub ({type(error).__name__}); "
            f"give a local folder, or one of the embedded models: {names()}"
        ) from error


def _check_quantization(name: str, quantization: object) -> None:
    """Raises StartupError unless a config's quantization_config is none, or the one that is read."""
    if not quantization:
        return
    found = quantization if isinstance(quantization, dict) else {}
    method = found.get("quant_method", "bitsandbytes" if found else "?")
    if method != "bitsandbytes" or not found.get("load_in_4bit") or found.get("bnb_4bit_quant_type") != "nf4":
        raise StartupError(
            f"{name}: the checkpoint is quantized with {method}; loramux reads dense checkpoints and bitsandbytes NF4"
        )


def _forget_code(config: PretrainedConfig) -> None:
    """Drop what names Python files, of the parts' configs too: a folder whose architecture transformers has is served
    with transformers' code."""
    config.__dict__.pop("auto_map", None)
    for part in config.sub_configs:
        inner = getattr(config, part, None)
        if isinstance(inner, PretrainedConfig):
            _forget_code(inner)


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A folder in which `file` lies alone, under its own name.

    What else lies beside it would be read as well: an adapter_config.json there makes transformers load the base that
    it names.
    """
    with tempfile.TemporaryDirectory(prefix="loramux-") as scratch:
        folder = Path(scratch)
        (folder / file.name).symlink_to(file.resolve())
        yield folder


def _generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    with refusing(f"{folder}: transformers cannot read generation_config.json", StartupError):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def _tokenizer(folder: Path, gguf: str | None) -> object | None:
    options = {} if gguf is None else {"gguf_file": gguf}
    if gguf is None and not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    with refusing(f"{folder}: transformers cannot read the tokenizer", StartupError):
        return AutoTokenizer.from_pretrained(folder, **options, **_NO_CODE)

"""Broken adapter folders: each is refused with an error that names what is wrong, and nothing is taken on trust."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loramux.errors import InvalidAdapter
from loramux.lora import header, snapshot
from loramux.lora.adapter import Adapter
from loramux.lora.limits import ReadLimits
from loramux.lora.peft_files import read_adapter
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE
from loramux.ops.site import Site
from torch import Tensor

from tests.lora.folders import K0, LIMITS, Q0, SITES, factors, raw, write

A = f"base_model.model.{Q0}.lora_A.weight"
B = f"base_model.model.{Q0}.lora_B.weight"
M = f"base_model.model.{Q0}.lora_magnitude_vector"


def refused(folder: Path, *says: str, limits: ReadLimits = LIMITS) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter(folder, SITES, limits=limits)
    for text in says:
        assert text in caught.value.message
    return caught.value


def test_a_good_adapter_is_read(tmp_path: Path) -> None:
    files = read_adapter(write(tmp_path), SITES, limits=LIMITS)
    (only,) = files.factors
    assert (only.site.name, only.rank, only.scale) == (Q0, 2, 2.0)
    assert torch.equal(only.a, factors(Q0)[A])
    assert files.digest.startswith("sha256:")
    assert files.digest == snapshot.folder_digest(tmp_path, LIMITS)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {A: entry([2, 16], 0, 128), B: entry([16, 2], 128, 256)}
BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"1234567", "too few"),
    "header length bomb": (raw({}, length=2**63), "claims a header of 9223372036854775808 bytes"),
    "header beyond the file": (raw({}, length=100_000), "it was cut off"),
    "zip pickle": (b"PK\x03\x04" + b"\0" * 64, "pickle"),
    "plain pickle": (b"\x80\x04" + b"\0" * 64, "pickle"),
    "header is no JSON": (raw(b"{nope"), "not valid JSON"),
    "header is not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "header is a list": (raw([]), "not a JSON object"),
    "header of deep nesting": (raw(b'{"a":' + b"[" * 100_000), "not described"),
    "entry of deep nesting": (raw(b'{"a":{"b":' + b"[" * 100_000), "no end within"),
    "metadata of deep nesting": (raw(b'{"__metadata__":' + b"[" * 100_000), "__metadata__ is broken"),
    "a name twice": (raw(b'{"a": %s, "a": {}}' % json.dumps(entry([1], 0, 4)).encode()), "twice"),
    "no tensors": (raw({"__metadata__": {"format": "pt"}}), "no tensors"),
    "no tensors but bytes": (raw({}, b"1234"), "belong to no tensor"),
    "truncated": (raw(GOOD, b"\0" * 255), "cut off"),
    "trailing bytes": (raw(GOOD, b"\0" * 257), "belong to no tensor"),
    "overlap": (raw({A: entry([2, 16], 0, 128), B: entry([16, 2], 64, 192)}, b"\0" * 192), "overlaps"),
    "same bytes twice": (raw({A: entry([2, 16], 0, 128), B: entry([16, 2], 0, 128)}, b"\0" * 128), "overlaps"),
    "gap": (raw({A: entry([2, 16], 0, 128), B: entry([16, 2], 160, 288)}, b"\0" * 288), "gap"),
    "starts late": (raw({A: entry([2, 16], 8, 136)}, b"\0" * 136), "gap"),
    "span is not the shape": (raw({A: entry([2, 16], 0, 64)}, b"\0" * 64), "128 bytes"),
    "negative offsets": (raw({A: entry([2, 16], -128, 0)}, b""), "whole numbers"),
    "backwards": (raw({A: entry([2, 16], 128, 0)}, b"\0" * 128), "span -128"),
    "huge shape": (raw({A: entry([2**40, 2**40], 0, 128)}, b"\0" * 128), "data_offsets span 128"),
    "bool in shape": (raw({A: {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4), "whole numbers"),
    "float in shape": (raw({A: {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"\0" * 4), "whole numbers"),
    "no offsets": (raw({A: {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "data_offsets"),
    "entry is a number": (raw({A: 5}), "data_offsets"),
    "int8": (raw({A: entry([2, 16], 0, 32, "I8")}, b"\0" * 32), "dtype 'I8'"),
    "float64": (raw({A: entry([2, 16], 0, 256, "F64")}, b"\0" * 256), "dtype 'F64'"),
    "dtype is a list": (raw({A: {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "dtype"),
    "40,000 dimensions": (raw({A: entry([2**47] * 40_000, 0, 0)}), "no end within"),
    "nine dimensions": (raw({A: entry([1] * 9, 0, 4)}, b"\0" * 4), "9 dimensions; the limit is 8"),
    "eight huge dimensions": (raw({A: entry([2**47] * 8, 0, 0)}), "data_offsets span 0"),
    "a size of 4,000 digits": (raw(b'{"%s": {"shape": [%s]}}' % (A.encode(), b"9" * 4000)), "no end within"),
    "nesting in an entry": (raw(b'{"%s": {"shape": [[[1]]]}}' % A.encode()), "data_offsets"),
    "an object in an entry": (raw(b'{"%s": {"shape": {}}}' % A.encode()), "not valid JSON"),
    "a field twice": (raw(b'{"%s": {"dtype": "F32", "dtype": "F16"}}' % A.encode()), "twice"),
    "metadata twice": (raw(b'{"__metadata__": {}, "__metadata__": {}}'), "twice"),
    "metadata without an end": (raw(b'{"__metadata__": {"a": "'), "__metadata__ is broken"),
    "no comma": (raw(b'{"__metadata__": {} "a": {}}'), "comma"),
    "no colon": (raw(b'{"a" {}}'), "colon"),
    "a name without quotes": (raw(b"{a: {}}"), "quotes"),
    "a control character in a name": (raw(b'{"a\n": {}}'), "not valid JSON"),
    "something after the header": (raw(b'{"__metadata__": {}} {}'), "follows its end"),
    "long name": (raw({"x" * 300: entry([1], 0, 4)}, b"\0" * 4), "300 characters"),
}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 3721400\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
OTHER_FILES: dict[str, tuple[bytes, str]] = {
    "Git LFS pointer": (POINTER, "`git lfs pull`"),
    "web page": (PAGE, "web page (HTML)"),
    "Git LFS pointer, Windows": (POINTER.replace(b"\n", b"\r\n"), "`git lfs pull`"),
    "Git LFS pointer after a byte order mark": (b"\xef\xbb\xbf" + POINTER, "`git lfs pull`"),
    "Git LFS pointer after a line": (b"\n" + POINTER, "`git lfs pull`"),
    "web page after a byte order mark": (b"\xef\xbb\xbf\r\n" + PAGE, "web page (HTML)"),
    "web page after blanks": (b"\n\t " + PAGE.lower(), "web page (HTML)"),
    "web page in UTF-16": (PAGE.decode().encode("utf-16"), "web page (HTML)"),
    "part of a web page": (b"<title>503 Service Unavailable</title>", "web page (HTML)"),
    "XHTML": (b'<?xml version="1.0"?>\n<!DOCTYPE html>', "web page (HTML)"),
    "very many comments": (b"<!---->" * 73, "web page (HTML)"),
    "XML without a declaration": (b"<Error><Code>NoSuchKey</Code></Error>", "XML"),
    "a link's text": (b"../../blobs/4d7a", "symbolic link"),
    "an annexed file's link": (b"../.git/annex/objects/x/SHA256E-s1--a", "`git annex get`"),
    "blanks": (b" " * 600, "blanks only"),
    "UTF-16 without a mark": ('{"a": 1}\n'.encode("utf-16-le"), "UTF-16|JSON"),
    "empty zip": (b"PK\x05\x06" + b"\0" * 18, "zip archive"),
    "a pickle of protocol 0": (pickle.dumps({"a": 1}, 0), "a pickle"),
    "a pickle of protocol 1": (pickle.dumps({"a": 1}, 1), "a pickle"),
    "web page after a comment": (b"\n <!-- x -->\n<html lang=en>", "web page (HTML)"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "text": (b"Entry not found", "begins with 'Entry not found'"),
    "text of several bytes a character, cut": ("ä".encode() * 300, "begins with"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-16|JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark|JSON"),
    "gzip": (b"\x1f\x8b\x08\x00" + b"\0" * 60, "gzip"),
    "tar": (b"a/" + b"\0" * 255 + b"ustar\x0000" + b"\0" * 248, "tar archive"),
    "GGUF": (b"GGUF\x03" + b"\0" * 60, "llama.cpp"),
    "NumPy": (b"\x93NUMPY\x01\x00v\x00{'descr'", "NumPy"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "ONNX"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 60, "HDF5"),
    "zeros": (b"\0" * 600, "zero bytes"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize(("data", "says"), OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_what_lies_in_a_files_place_is_told(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    """A clone without git-lfs was said to claim a header of 2336927755350992246 bytes."""
    write(tmp_path)
    (tmp_path / name).write_bytes(data)
    message = refused(tmp_path, name).message
    assert any(text in message for text in says.split("|"))
    assert name == WEIGHTS_FILE or "python -c" not in message, "what makes weights of a pickle makes no config of it"


def test_a_file_cut_off_within_its_length_is_no_text(tmp_path: Path) -> None:
    """Every other byte of a short length is zero, as in UTF-16."""
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes((93).to_bytes(8, "little"))
    refused(tmp_path, "cut off")


def test_another_byte_order_is_told(tmp_path: Path) -> None:
    write(tmp_path)
    data = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(data[7::-1] + data[8:])
    refused(tmp_path, "big-endian")


def test_exchanged_files_are_told(tmp_path: Path) -> None:
    write(tmp_path)
    config, weights = (tmp_path / name for name in (CONFIG_FILE, WEIGHTS_FILE))
    text, tensors = config.read_bytes(), weights.read_bytes()
    weights.write_bytes(text)
    refused(tmp_path, WEIGHTS_FILE, "is JSON", "exchanged")
    weights.write_bytes(tensors)
    config.write_bytes(tensors)
    refused(tmp_path, CONFIG_FILE, "safetensors", "exchanged")


def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path: Path) -> None:
    """1f 8b 08 is what gzip begins with, and a length as good as any."""
    write(tmp_path)
    text = json.dumps(GOOD).encode()
    text += b" " * (int.from_bytes(b"\x1f\x8b\x08", "little") - len(text))
    (tmp_path / WEIGHTS_FILE).write_bytes(raw(text, b"\0" * 256))
    assert len(read_adapter(tmp_path, SITES, limits=LIMITS).factors) == 1


NEIGHBOURS: dict[str, tuple[str, str]] = {
    "one level too high": ("checkpoint-500/adapter_config.json", "checkpoint-500"),
    "MLX": ("adapters.safetensors", "MLX"),
    "torchtune": ("adapter_0.pt", "torchtune"),
    "several files": ("adapter_model-00001-of-00002.safetensors", "several files"),
    "FSDP shards": ("pytorch_model_fsdp_0/__0_0.distcp", "FULL_STATE_DICT"),
    "DeepSpeed shards": ("global_step500/zero_pp_rank_0.pt", "stage3_gather"),
    "diffusers": ("pytorch_lora_weights.safetensors", "diffusers"),
    "GGUF": ("adapter.gguf", "llama.cpp"),
    "MLX, an older version": ("adapters.npz", "MLX"),
    "another pickle": ("lora.ckpt", "never opened"),
    "an archive": ("adapter_model.tar.gz", "unpack it"),
    "another ending": ("adapter_model.SAFETENSORS", "rename it"),
    "Megatron's shards": ("iter_0000010/mp_rank_00/model_optim_rng.pt", "in shards"),
    "rsync, before it renames": (".adapter_model.safetensors.Xy12ab", "has not ended"),
    "weights in a folder": ("weights/adapter_model.safetensors", "put both files into one folder"),
    "what trainers save beside": ("optimizer.pt", "save_pretrained writes"),
    "an unfinished download": ("adapter_model.safetensors.incomplete", "has not ended"),
}


@pytest.mark.parametrize(("file", "says"), NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_what_lies_beside_a_missing_file_is_told(tmp_path: Path, file: str, says: str) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    refused(tmp_path, f"has no {WEIGHTS_FILE}", says)


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    """As a cache that was copied without what its links lead to."""
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    (tmp_path / WEIGHTS_FILE).symlink_to("../../blobs/4d7a")
    refused(tmp_path, "leads nowhere", "cp -rL")


def test_a_repository_of_a_cache_is_told(tmp_path: Path) -> None:
    for folder in ("blobs", "refs", "snapshots/4d7a"):
        (tmp_path / folder).mkdir(parents=True)
    refused(tmp_path, "Hugging Face cache", "snapshots")


def test_weights_alone_need_their_config(tmp_path: Path) -> None:
    (write(tmp_path) / CONFIG_FILE).unlink()
    refused(tmp_path, f"has no {CONFIG_FILE}", "rank and alpha")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2])
def test_the_command_for_another_dtype_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    write(tmp_path, {key: tensor.to(dtype) for key, tensor in factors(Q0).items()})
    run_advice(refused(tmp_path, "has dtype").message, tmp_path, monkeypatch)
    (read,) = read_adapter(tmp_path, SITES, limits=LIMITS).factors
    assert torch.equal(read.a, factors(Q0)[A].to(dtype).float())


VISION = ("base_model.model.model.visual.blocks.0.attn.qkv", "base_model.model.model.multi_modal_projector.linear_1")


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.model.language_"])
def test_other_parts_of_a_multimodal_model_are_told_and_the_command_drops_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """The first key of the language model was named as one that fits no layer."""
    both = factors(Q0, prefix=prefix) | {f"{m}.lora_{p}.weight": torch.ones(4, 4) for m in VISION for p in "AB"}
    write(tmp_path, both, target_modules=["q_proj", "qkv", "linear_1"])
    error = refused(tmp_path, "visual", "multi_modal_projector", "another part")
    assert "q_proj" not in error.message
    run_advice(error.message, tmp_path, monkeypatch)
    assert len(read_adapter(tmp_path, SITES, limits=LIMITS).factors) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves closing a file to Python
@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS_FILE])
def test_the_command_for_a_pickle_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As the message gives it: tensors that are not contiguous, share memory, or are trained parameters made the one
    before fail."""
    write(tmp_path, target_modules=["q_proj", "k_proj"])
    (tmp_path / WEIGHTS_FILE).unlink()
    tensors = {key: tensor.t().contiguous().t() for key, tensor in factors(Q0, K0).items()}
    shared = torch.stack([tensors[A], tensors[A]])
    tensors[A], tensors[A.replace("q_proj", "k_proj")] = torch.nn.Parameter(shared[0]), shared[1]
    torch.save(tensors | {"epoch": 3}, tmp_path / name)
    run_advice(refused(tmp_path, "never opened", "weights_only=True").message, tmp_path, monkeypatch)
    read = {f.site.name: f.a for f in read_adapter(tmp_path, SITES, limits=LIMITS).factors}
    assert torch.equal(read[Q0], shared[0])
    assert torch.equal(read[K0], shared[1])


def run_advice(message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command that a message ends with in `folder`; in this process, for another one would only import torch
    again."""
    command = re.search(r'python -c "([^"]+)"$', message)
    assert command is not None, message
    assert not set("$`\\!") & set(command[1]), "a shell would read it otherwise"
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(command[1], {})


@pytest.mark.parametrize(("data", "says"), BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_broken_weights_file(tmp_path: Path, data: bytes, says: str) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(data)
    refused(tmp_path, says)


def test_the_hand_made_header_is_good_when_nothing_is_broken(tmp_path: Path) -> None:
    """Otherwise the table above might be refused for another reason than the one it means."""
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(raw(GOOD, b"\0" * 256))
    assert len(read_adapter(tmp_path, SITES, limits=LIMITS).factors) == 1


def test_a_file_cut_off_at_every_length_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / WEIGHTS_FILE).write_bytes(whole[:length])
        refused(tmp_path)


@pytest.mark.parametrize("pickle", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_never_opened(tmp_path: Path, pickle: str) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / pickle)
    error = refused(tmp_path, pickle, "never opened", "torch.load(")
    assert error.reason == "ADAPTER_FILES_MISSING"


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).unlink()
    assert refused(tmp_path, name).reason == "ADAPTER_FILES_MISSING"


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_pipe_or_a_folder_in_a_files_place_does_not_hang(tmp_path: Path, name: str) -> None:
    """Opening a pipe waits for a writer: a worker would be lost for good."""
    write(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(tmp_path, "not a regular file")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(tmp_path, f"{name}: is a folder")
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(name)
    refused(tmp_path, name, "leads in a circle")


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (ReadLimits(file_bytes=100), "the limit is 100"),
        (ReadLimits(config_bytes=10), "the limit is 10"),
        (ReadLimits(header_bytes=16), "the limit is 16"),
        (ReadLimits(tensors=1), "the limit is 1"),
        (ReadLimits(rank=1), "rank 2; the limit is 1"),
    ],
)
def test_limits(tmp_path: Path, limits: ReadLimits, says: str) -> None:
    refused(write(tmp_path), says, limits=limits)


def poison(value: float) -> dict[str, Tensor]:
    tensors = factors(Q0)
    tensors[B][3, 1] = value
    return tensors


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): tensor for key, tensor in factors(Q0).items()}


def without(key: str) -> dict[str, Tensor]:
    return {k: t for k, t in factors(Q0).items() if k != key}


def extra(key: str, *shape: int) -> dict[str, Tensor]:
    return factors(Q0) | {key: torch.zeros(*shape)}


BROKEN_TENSORS: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, object], tuple[str, ...]]] = {
    "NaN": (lambda: poison(float("nan")), {}, (B, "1 NaN or Inf")),
    "Inf": (lambda: poison(float("-inf")), {}, (B, "1 NaN or Inf")),
    "rank above the config": (lambda: factors(Q0, rank=4), {"r": 2}, ("rank 4", "rank 2")),
    "rank below the config": (lambda: factors(Q0, rank=1), {"r": 2}, ("rank 1", "rank 2")),
    "rank against rank_pattern": (lambda: factors(Q0), {"rank_pattern": {"q_proj": 7}}, ("rank 2", "rank 7")),
    "A and B of two ranks": (
        lambda: factors(Q0) | {B: torch.zeros(16, 5)},
        {},
        (B, "rank 5", "rank 2"),
    ),
    "wider base": (
        lambda: factors(Q0) | {A: torch.zeros(2, 32)},
        {},
        (A, "32 columns", "16 in features", "another base"),
    ),
    "taller base": (lambda: factors(Q0) | {B: torch.zeros(32, 2)}, {}, (B, "32 rows", "16 out features")),
    "one dimension": (lambda: factors(Q0) | {A: torch.zeros(32)}, {}, (A, "[32]", "Gather")),
    "three dimensions": (lambda: factors(Q0) | {A: torch.zeros(2, 16, 1)}, {}, (A, "[2, 16, 1]")),
    "not gathered": (lambda: factors(Q0) | {A: torch.zeros(0)}, {}, (A, "ZeRO-3")),
    "A without B": (lambda: without(B), {}, (Q0, "no lora_B.weight")),
    "B without A": (lambda: without(A), {}, (Q0, "no lora_A.weight")),
    "another layer": (lambda: renamed("layers.0.", "layers.9."), {}, ("layers.9", "the base has 14")),
    "another module": (
        lambda: renamed("q_proj", "qkv_proj"),
        {},
        ("qkv_proj", "model.layers.0 has model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj"),
    ),
    "one of two unknown": (
        lambda: factors(Q0) | renamed("q_proj", "fused_proj"),
        {},
        ("fused_proj.lora_A.weight", "matches no linear layer"),
    ),
    "embedding": (lambda: extra("base_model.model.model.embed_tokens.lora_embedding_A", 2, 9), {}, ("embed_tokens",)),
    "head": (lambda: extra("base_model.model.lm_head.lora_A.weight", 2, 16), {}, ("lm_head", "output head")),
    "resized embedding": (
        lambda: extra("base_model.model.model.embed_tokens.weight", 9, 16),
        {},
        ("embed_tokens.weight",),
    ),
    "modules_to_save": (
        lambda: extra("base_model.model.score.modules_to_save.weight", 2, 16),
        {},
        ("modules_to_save",),
    ),
    "trained bias": (lambda: extra(f"base_model.model.{Q0}.bias", 16), {}, (f"{Q0}.bias",)),
    "DoRA not in the config": (lambda: extra(M, 16), {}, (M, "use_dora=true", "correct one of the two")),
    "DoRA only in the config": (lambda: factors(Q0), {"use_dora": True}, (Q0, "no lora_magnitude_vector")),
    "DoRA of another size": (lambda: extra(M, 8), {"use_dora": True}, (M, "[8]", "[16]", "another base")),
    "DoRA, a row each": (lambda: extra(M, 16, 1), {"use_dora": True}, (M, "[16, 1]", "[16]")),
    "DoRA of an embedding": (
        lambda: extra("base_model.model.model.embed_tokens.lora_magnitude_vector", 9),
        {"use_dora": True},
        ("embed_tokens", "embedding"),
    ),
    "QA-LoRA that was not pooled": (
        lambda: factors(Q0),
        {"use_qalora": True, "qalora_group_size": 4},
        ("lora_A", "pools 4", "set use_qalora=false"),
    ),
    "QA-LoRA of another group size": (
        lambda: factors(Q0) | {A: torch.ones(2, 4)},
        {"use_qalora": True, "qalora_group_size": 8},
        ("lora_A", "4 columns", "groups of 8", "16 in features", "qalora_group_size"),
    ),
    "pooled, but not in the config": (lambda: factors(Q0) | {A: torch.ones(2, 4)}, {}, ("lora_A", "4 columns")),
    "KaSA": (lambda: extra(f"base_model.model.{Q0}.lora_diag", 2), {}, ("lora_diag",)),
    "parameter": (
        lambda: extra("base_model.model.mlp.experts.base_layer.lora_A.weight", 2, 2),
        {},
        ("target_parameters",),
    ),
    "bias of A": (lambda: extra(f"base_model.model.{Q0}.lora_A.bias", 2), {}, ("lora_A.bias",)),
    "bias not in the config": (lambda: factors(Q0, bias=True), {}, ("lora_B.bias", "lora_bias")),
    "bias only in the config": (lambda: factors(Q0), {"lora_bias": True}, ("lora_B.bias", Q0)),
    "bias of another size": (
        lambda: factors(Q0, bias=True) | {B.replace("weight", "bias"): torch.zeros(5)},
        {"lora_bias": True},
        ("[5]", "[16]"),
    ),
    "two adapters": (
        lambda: factors(Q0) | renamed("lora_A.weight", "lora_A.other.weight"),
        {},
        ("same part", "one adapter"),
    ),
}


@pytest.mark.parametrize(("tensors", "fields", "says"), BROKEN_TENSORS.values(), ids=BROKEN_TENSORS.keys())
def test_broken_tensors(
    tmp_path: Path, tensors: Callable[[], dict[str, Tensor]], fields: dict[str, object], says: tuple[str, ...]
) -> None:
    refused(write(tmp_path, tensors(), **fields), *says)


def shares(**parts: int) -> dict[str, Tensor]:
    """The first of so many parts of the tensors whose keys contain the name, cut as FSDP does: by rows."""
    tensors = factors(*(site.name for site in SITES if "self_attn" in site.name), rank=4, bias=True)
    for name, count in parts.items():
        tensors = {k: t[: len(t) // count].contiguous() if name in k else t for k, t in tensors.items()}
    return tensors


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("names", [("lora_A",), ("lora_B.weight",), ("lora_B",), ("lora_A", "lora_B"), ("bias",)])
def test_a_part_of_a_sharded_model_is_told(tmp_path: Path, names: tuple[str, ...], parts: int) -> None:
    """ "Trained on another base" and "correct r" sent the user of an FSDP run the wrong way."""
    folder = write(tmp_path, shares(**dict.fromkeys(names, parts)), r=4, lora_bias=True)
    refused(folder, f"1/{parts} of", "FULL_STATE_DICT", "ZeRO-3")


def test_a_part_that_does_not_divide_evenly_is_told(tmp_path: Path) -> None:
    """The first of three processes has six of sixteen rows."""
    tensors = {k: t[:6].contiguous() if "lora_B" in k else t for k, t in factors(Q0).items()}
    refused(write(tmp_path, tensors), "1/3 of", "FULL_STATE_DICT")


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_"])
def test_an_empty_part_of_a_sharded_model_is_told(tmp_path: Path, name: str) -> None:
    """What a process saves that holds no row of them: the load failed with a traceback where all were empty."""
    tensors = {k: t[:0] if name in k else t for k, t in factors(Q0).items()}
    refused(write(tmp_path, tensors), "FULL_STATE_DICT")


def test_a_smaller_rank_in_both_factors_is_no_shard(tmp_path: Path) -> None:
    assert "shard" not in refused(write(tmp_path, factors(Q0, rank=2), r=4), "rank 2").message


def test_one_adapter_for_two_towers_of_one_layer_is_refused(tmp_path: Path) -> None:
    paths = (Q0.replace("model.", f"model.{tower}.", 1) for tower in ("language_model", "text_model"))
    tensors = {k: t for path in paths for k, t in renamed(Q0, path).items()}
    refused(write(tmp_path, tensors), "fit the same layer")


def test_wrapped_and_plain_keys_of_one_layer_are_refused(tmp_path: Path) -> None:
    tensors = factors(Q0) | {f"module.{key}": tensor for key, tensor in factors(Q0).items()}
    refused(write(tmp_path, tensors), "same part")


@pytest.mark.parametrize("name", ["default", "lora_text", "lora_base", "modules_to_save", "lora_diag"])
def test_an_adapters_name_in_the_keys_is_any(tmp_path: Path, name: str) -> None:
    """Some names hold what tells another format."""
    named = {key.replace(".weight", f".{name}.weight"): tensor for key, tensor in factors(Q0).items()}
    assert len(read_adapter(write(tmp_path, named, target_modules=["q_proj"]), SITES, limits=LIMITS).factors) == 1


def test_a_whole_model_in_the_weights_place_is_told(tmp_path: Path) -> None:
    """The advice was to drop what is no LoRA, which is all of it."""
    refused(write(tmp_path, {f"{Q0}.weight": torch.ones(16, 16), "lm_head.weight": torch.ones(4, 16)}), "whole model")


OTHER_KEYS = {
    "flat_param": ("base_model.model._fsdp_wrapped_module._flat_param", "FULL_STATE_DICT"),
    "MLX": (f"{Q0}.lora_a", "MLX"),
    "torchtune": ("layers.0.attn.q_proj.lora_b.weight", "torchtune"),
    "kohya": ("lora_unet_down_blocks_0_attentions_0.lora_down.weight", "kohya"),
    "LoHa": (f"base_model.model.{Q0}.hada_w1_a", "LoHa"),
    "prompt tuning": ("prompt_embeddings", "prompt tuning"),
    "trainable tokens": ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "embedding"),
}


@pytest.mark.parametrize(("key", "says"), OTHER_KEYS.values(), ids=OTHER_KEYS.keys())
def test_what_another_format_is_is_told(tmp_path: Path, key: str, says: str) -> None:
    refused(write(tmp_path, {key: torch.ones(4, 4)}), key, says)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"lora_alpha": 1e38}, "once scaled"), ({"lora_alpha": 1e308}, "lora_alpha"), ({"lora_alpha": -1e38}, "scaled")],
)
def test_a_scale_that_overflows_is_refused(tmp_path: Path, fields: dict[str, object], says: str) -> None:
    tensors = {key: tensor * 1e3 for key, tensor in factors(Q0).items()}
    write(tmp_path, tensors, r=2, **fields)
    with pytest.raises(InvalidAdapter, match=says):
        placed(tmp_path)


def placed(folder: Path) -> Adapter:
    files = read_adapter(folder, SITES, limits=LIMITS)
    return Adapter.build(files, SITES, torch.device("cpu"), torch.float32)


def test_no_piece_of_a_header_is_longer_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parser in C gets holds the interpreter's lock: a header of 16 MiB in one piece took five seconds."""
    lengths = []

    class Counted(json.JSONDecoder):
        def decode(self, s: str, *rest: Any) -> Any:
            lengths.append(len(s))
            return super().decode(s, *rest)

    monkeypatch.setattr(header, "_DECODER", Counted(object_pairs_hook=list))
    text = json.dumps({f"x{i}": entry([], 4 * i, 4 * i + 4) for i in range(5000)}).encode()
    assert len(header.parse_header(text, 8 + len(text) + 20_000, LIMITS)) == 5000
    assert len(lengths) == 5000
    assert max(lengths) < 1024


@pytest.mark.parametrize("rename", [("", ""), ("base_model.model.", ""), ("lora_A.weight", "lora_A.default.weight")])
def test_keys_as_people_write_them(tmp_path: Path, rename: tuple[str, str]) -> None:
    files = read_adapter(write(tmp_path, renamed(*rename) if rename[0] else factors(Q0)), SITES, limits=LIMITS)
    assert [f.site.name for f in files.factors] == [Q0]


@pytest.mark.parametrize("module", ["layers.0.self_attn.q_proj", f"language_model.{Q0}"])
def test_one_prefix_may_differ_in_all_modules(tmp_path: Path, module: str) -> None:
    """An adapter that was trained on AutoModel lacks "model."; one of a larger model has more in front."""
    files = read_adapter(write(tmp_path, renamed(Q0, module)), SITES, limits=LIMITS)
    assert [f.site.name for f in files.factors] == [Q0]


def test_patterns_see_the_path_that_the_adapter_was_trained_with(tmp_path: Path) -> None:
    """rank_pattern keys are written against the training model, not against this base's names."""
    tensors = renamed(Q0, "layers.0.self_attn.q_proj")
    files = read_adapter(write(tmp_path, tensors, r=9, rank_pattern={"^layers.0.+": 2}), SITES, limits=LIMITS)
    assert files.factors[0].rank == 2


def test_an_ambiguous_prefix_is_refused(tmp_path: Path) -> None:
    """Guessing the tower of a two-tower model would serve wrong answers in silence."""
    towers = [Site(i, f"{tower}.{Q0}", 16, 16) for i, tower in enumerate(("text", "vision"))]
    write(tmp_path)
    with pytest.raises(InvalidAdapter, match="2 places"):
        read_adapter(tmp_path, towers, limits=LIMITS)


def test_a_prefix_is_not_guessed_when_some_modules_match_as_they_are(tmp_path: Path) -> None:
    tensors = factors(Q0) | {key.replace("model.model.", "model."): tensor for key, tensor in factors(K0).items()}
    refused(write(tmp_path, tensors), "matches no linear layer")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of an old and half of a new file may pass every other check."""
    write(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    parse = header.parse_header

    def rewrite(*args: object) -> object:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return parse(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("loramux.lora.snapshot.parse_header", rewrite)
    assert refused(tmp_path, "changed while it was read").reason == "ADAPTER_FILES_CHANGED"


def test_a_file_cut_off_while_it_is_read_does_not_kill_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file would: the first touch of a lost page is SIGBUS."""
    write(tmp_path)
    start = snapshot._start

    def cut(file: object, digest: object) -> int:
        size = start(file, digest)  # type: ignore[arg-type]
        if str(file.name).endswith(WEIGHTS_FILE):  # type: ignore[attr-defined]
            os.truncate(tmp_path / WEIGHTS_FILE, 10)
        return size

    monkeypatch.setattr(snapshot, "_start", cut)
    refused(tmp_path, "changed while it was read")


def test_unreadable_files_are_an_adapter_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    assert refused(tmp_path, "Permission denied").reason == "ADAPTER_FILES_UNREADABLE"


def test_the_digest_tells_every_byte_of_both_files(tmp_path: Path) -> None:
    """Idempotent loads compare digests: bytes that move from one file to the other must show."""
    digests = set()
    for index, (config, weights) in enumerate([(b"ab", b"c"), (b"a", b"bc"), (b"ab", b"d"), (b"", b"abc")]):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / CONFIG_FILE).write_bytes(config)
        (folder / WEIGHTS_FILE).write_bytes(weights)
        digests.add(snapshot.folder_digest(folder, LIMITS))
    assert len(digests) == 4


def test_read_leaves_no_open_files(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad", poison(float("nan")))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_adapter(good, SITES, limits=LIMITS)
        refused(bad)
        refused(good, limits=ReadLimits(file_bytes=1))
    assert len(os.listdir("/proc/self/fd")) == before


def test_config_errors_come_through(tmp_path: Path) -> None:
    refused(write(tmp_path, kasa_config={}), "kasa_config", "train with it unset")
    (tmp_path / CONFIG_FILE).write_text(json.dumps([]))
    refused(tmp_path, CONFIG_FILE)

"""What to say of an adapter folder that lacks one of its two files: what it holds instead, the way out. No torch."""

from __future__ import annotations

import re

from loramux.lora.file_type import conversion
from loramux.lora.folder import OpenedFolder
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE

_MOST_ENTRIES = 1000  # of a folder are looked at
_MOST_NAMED = 4
_PICKLE = re.compile(r"[\w][\w .-]*\.(bin|pt|pth|ckpt|pkl|pickle)", re.ASCII | re.IGNORECASE)  # fit for a shell, too
_OF_TRAINER = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state|random_states|trainer)", re.IGNORECASE)
_MODEL = ("model.safetensors", "model-0", "pytorch_model", "consolidated.", "flax_model", "tf_model")
_SHARDS = ("global_step", "pytorch_model_fsdp", "distcp", "__0_0", "iter_0", "mp_rank_", "latest_checkpointed")
_PACKED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".lz4")
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp", ".filepart")
_GATHER = (
    "gather it before it is saved (FSDP: FULL_STATE_DICT, DeepSpeed: stage3_gather_16bit_weights_on_model_save), and "
    "save with PEFT's save_pretrained"
)


def missing(opened: OpenedFolder, name: str) -> str:
    """The sentence about a folder that has no `name`."""
    names = opened.names(_MOST_ENTRIES)
    if name in names:  # and yet it is not there
        return (
            f"{opened.folder}/{name} is a link that leads nowhere; put the file itself there, or copy the folder with "
            "what its links lead to (cp -rL)"
        )
    return f"{opened.folder} has no {name}; {_instead(opened, name, names)}"


def _instead(opened: OpenedFolder, name: str, names: list[str]) -> str:
    if not names:
        return "it is empty"
    if {"snapshots", "blobs"} <= set(names):
        return (
            "it is a repository of a Hugging Face cache: name a folder in its snapshots as the source, or start the "
            "server with the cache's folder as an --adapter-dir, under which it is found by itself"
        )
    told = _inner(opened, name, names)
    if name == WEIGHTS_FILE:
        told = told or _weights([n for n in names if n.startswith("adapter_model")])
    told = told or _other_format(names)
    if name == WEIGHTS_FILE:
        told = told or _weights(names)
    if told is not None:
        return told
    partial = next((n for n in names if n.endswith(_UNFINISHED) or n.startswith(f".{name}.")), None)
    if partial is not None:
        return f"{partial} is a download or a copy that has not ended; wait for it, or fetch it again"
    packed = next((n for n in names if n.lower().endswith(_PACKED)), None)
    if packed is not None:
        return f"{packed} is an archive; unpack it, and put the files themselves into the folder"
    alike = next((n for n in names if n.lower().endswith(name[name.index(".") :]) and _may_be(n, name)), None)
    if alike is not None:
        return f"if {alike} is it, rename it to {name}"
    if name == CONFIG_FILE and WEIGHTS_FILE in names:
        return f"{WEIGHTS_FILE} alone does not say rank and alpha: PEFT's save_pretrained writes both; copy it, too"
    return "an adapter folder is what PEFT's save_pretrained writes"


def _may_be(found: str, name: str) -> bool:
    """Whether a file of the same ending may be it: any one that holds tensors, or a config of nearly the name."""
    return name == WEIGHTS_FILE or found.lower().startswith("adapter")


def _inner(opened: OpenedFolder, name: str, names: list[str]) -> str | None:
    inner = [n for n in names if opened.holds(f"{n}/{CONFIG_FILE}")][:_MOST_NAMED]
    if inner:
        more = ", …" if len(inner) == _MOST_NAMED else ""
        return f"it is one level too high: name one of the adapters in it as the source ({', '.join(inner)}{more})"
    beside = next((n for n in names if opened.holds(f"{n}/{name}")), None)
    return None if beside is None else f"it is in {beside}; put both files into one folder"


def _other_format(names: list[str]) -> str | None:
    mlx = next((n for n in names if n.endswith(("adapters.safetensors", "adapters.npz"))), None)
    if mlx is not None:
        return (
            f"{mlx} is MLX's format. Convert it: lora_a becomes lora_A.weight and lora_b lora_B.weight, both "
            "transposed, under base_model.model.; r is MLX's rank, and lora_alpha is rank * scale"
        )
    if "pytorch_lora_weights.safetensors" in names:
        return "pytorch_lora_weights.safetensors is a LoRA of diffusers, for image models"
    if any(n.startswith("adapter_") and n.endswith((".pt", ".bin")) and n[8:-3].rstrip(".").isdigit() for n in names):
        return "it is torchtune's checkpoint; its recipes write PEFT's format with a FullModelHFCheckpointer"
    if any(n.endswith(".gguf") for n in names):
        return "it holds GGUF, llama.cpp's format; load the PEFT folder that it was made from"
    if any(n.startswith(_SHARDS) for n in names):
        return f"it is a checkpoint in shards (FSDP, DeepSpeed or Megatron); {_GATHER}"
    if any(n.endswith(".nemo") for n in names):
        return "it is NeMo's format; export it as PEFT's (NeMo's export to Hugging Face)"
    if not {"config.json", "params.json"}.isdisjoint(names) and any(n.startswith(_MODEL) for n in names):
        return "it is a whole model, not an adapter; serve it with --model, or load what save_pretrained of PEFT wrote"
    return None


def _weights(names: list[str]) -> str | None:
    if "adapter_model.safetensors.index.json" in names or any(n.startswith("adapter_model-0") for n in names):
        return "it was saved in several files; load it in peft and save it with save_pretrained, which writes one"
    pickles = [n for n in names if _PICKLE.fullmatch(n) and not _OF_TRAINER.match(n)]
    if not pickles:
        return None
    pickle = next((n for n in pickles if n.startswith("adapter")), pickles[0])
    return (
        f"{pickle} is a pickle, which can run code and is never opened. Convert it in that folder, where you trust it: "
        f"{conversion(pickle)}"
    )

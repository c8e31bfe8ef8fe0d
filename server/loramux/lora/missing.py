"""What to say of an adapter folder that lacks one of its two files: what it holds instead, the way out. No torch."""

from __future__ import annotations

from loramux.lora.file_type import conversion
from loramux.lora.folder import OpenedFolder
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE

_MOST_ENTRIES = 1000  # of a folder are looked at
_MOST_NAMED = 4
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_GATHER = (
    "gather it before it is saved (FSDP: FULL_STATE_DICT, DeepSpeed: stage3_gather_16bit_weights_on_model_save), and "
    "save with PEFT's save_pretrained"
)


def missing(opened: OpenedFolder, name: str) -> str:
    """The sentence about a folder that has no `name`."""
    return f"{opened.folder} has no {name}; {_instead(opened, name, opened.names(_MOST_ENTRIES))}"


def _instead(opened: OpenedFolder, name: str, names: list[str]) -> str:
    held = frozenset(names)
    inner = [n for n in names if opened.holds(f"{n}/{CONFIG_FILE}")][:_MOST_NAMED]
    if inner:
        more = ", …" if len(inner) == _MOST_NAMED else ""
        return f"it is one level too high: name one of the adapters in it as the source ({', '.join(inner)}{more})"
    if "adapters.safetensors" in held:
        return (
            "adapters.safetensors is MLX's format. Convert it: lora_a becomes lora_A.weight and lora_b lora_B.weight, "
            "both transposed, under base_model.model.; r is MLX's rank, and lora_alpha is rank * scale"
        )
    if name == WEIGHTS_FILE:
        pickle = next((p for p in _PICKLES if p in held), None)
        if pickle is not None:
            return (
                f"{pickle} is a pickle, which can run code and is never opened. Convert it in that folder, where you "
                f"trust it: {conversion(pickle)}"
            )
        if "adapter_model.safetensors.index.json" in held or any(n.startswith("adapter_model-0") for n in names):
            return "it was saved in several files; load it in peft and save it with save_pretrained, which writes one"
        if any(n.startswith(("global_step", "pytorch_model_fsdp", "distcp", "__0_0")) for n in names):
            return f"it is a checkpoint in shards (FSDP or DeepSpeed); {_GATHER}"
    if "pytorch_lora_weights.safetensors" in held:
        return "pytorch_lora_weights.safetensors is a LoRA of diffusers, for image models"
    if any(n.startswith("adapter_") and n.endswith((".pt", ".bin")) and n[8:-3].rstrip(".").isdigit() for n in names):
        return "it is torchtune's checkpoint; its recipes write PEFT's format with a FullModelHFCheckpointer"
    if any(n.endswith(".gguf") for n in names):
        return "it holds GGUF, llama.cpp's format; load the PEFT folder that it was made from"
    if "config.json" in held and any(n.startswith(("model.safetensors", "model-0", "pytorch_model")) for n in names):
        return "it is a whole model, not an adapter; serve it with --model, or load what save_pretrained of PEFT wrote"
    partial = next((n for n in names if n.endswith((".incomplete", ".part", ".crdownload", ".aria2", ".tmp"))), None)
    if partial is not None:
        return f"{partial} is a download or a copy that has not ended; wait for it, or fetch it again"
    return "an adapter folder is what PEFT's save_pretrained writes"

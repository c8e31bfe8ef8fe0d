"""Which site of the base a tensor of an adapter belongs to. Knows names only; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from loramux.errors import InvalidAdapter
from loramux.lora.roots import WEIGHTS_FILE
from loramux.ops.site import Site

_LOWER_CASE = (
    "is in the format of MLX or torchtune, not PEFT's. From torchtune, save with a FullModelHFCheckpointer; from MLX, "
    "rename lora_a to lora_A.weight and lora_b to lora_B.weight, both transposed"
)
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.(?P<kind>weight|bias)")
_NAMED = re.compile(r"(\.lora_[AB])\.[^.]+(?=\.(?:weight|bias)$)")  # with the adapter's name
# PEFT writes no ".weight" here; files from other hands may have it.
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
# A module that is trained as a whole: what it was, and what became of it, where a checkpoint was saved without PEFT.
_OF_BASE = re.compile(
    r"(?P<module>.+?)(?:\.base_layer|\.original_module|\.modules_to_save(?:\.[^.]+)?)?\.(?P<kind>weight|bias)"
)
_LAYER = re.compile(r"(.*?\.\d+)\.")
_PEFT_PREFIX = re.compile(r"(?:^|.*?\.)base_model\.model\.")
# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing put into paths.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What a multimodal model calls its language model inside a path.
_TOWERS = frozenset(
    {
        *("language_model", "text_model", "text_decoder", "language_decoder", "llm"),
        *("text_tower", "language_tower", "language_backbone", "lang_model", "lang_encoder", "lm", "text"),
    }
)
# What it calls its other parts.
_OTHER_TOWERS = frozenset(
    {
        *(
            "visual",
            "vision_model",
            "vision_tower",
            "vision_encoder",
            "vision",
            "vit",
            "vpm",
            "image_encoder",
            "resampler",
        ),
        *("audio_tower", "audio_model", "audio_encoder", "speech_encoder", "talker", "token2wav", "code2wav"),
        *("multi_modal_projector", "mm_projector", "multimodal_projector", "embed_vision", "embed_audio", "mlp1"),
    }
)
HEADS_AND_EMBEDDINGS = frozenset({"lm_head", "embed_out", "embed_tokens", "wte", "wpe", "embed_in"})

# What a key that is no factor of a linear layer tells, and the way out.
_REFUSED_KEYS = (
    ("lora_diag", "belongs to KaSA, which trains on a changed base; train plain LoRA, with kasa_config unset"),
    ("lora_velora", "matters for training only; drop the lora_velora_embed tensors from the file"),
    ("lora_monteclora", "matters for training only; drop the lora_monteclora_sampler tensors from the file"),
    ("lora_embedding_", "targets an embedding, which all adapters share; train with linear layers only"),
    ("trainable_tokens", "changes the embedding, which all adapters share; train without trainable_token_indices"),
    (
        ".base_layer.lora_",
        "targets a parameter that is not a linear layer; use target_modules, not target_parameters",
    ),
    ("flat_param", "is a flat piece of an FSDP shard; gather the model before save_pretrained (FULL_STATE_DICT)"),
    ("lora_unet_", "belongs to an image model (kohya's format); this server serves language models"),
    ("lora_te", "belongs to an image model's text encoder (kohya's format); this server serves language models"),
    (".lora_down.", "is in kohya's format, not PEFT's: load it in diffusers and save it as PEFT"),
    (".lora_up.", "is in kohya's format, not PEFT's: load it in diffusers and save it as PEFT"),
    (".lora_a", _LOWER_CASE),
    (".lora_b", _LOWER_CASE),
    (".hada_w", "belongs to LoHa, which is not served, only LoRA is"),
    (".lokr_w", "belongs to LoKr, which is not served, only LoRA is"),
    (".ia3_", "belongs to IA3, which is not served, only LoRA is"),
    ("prompt_embeddings", "belongs to prompt tuning, which is not served, only LoRA is"),
)


@dataclass(frozen=True, slots=True)
class FactorKey:
    """A key of the file, taken apart.

    key     as the file has it
    module  the path in the model that the adapter was trained on, without what wraps models (see plain_path)
    part    "A", "B", "bias" (of B) or "magnitude" (of DoRA); "base weight" or "base bias" for a tensor of the base
            itself that was saved beside the factors
    seen    the same path as PEFT had it in training, where a wrapper may be inside
    """

    key: str
    module: str
    part: str
    seen: str

    @property
    def of_base(self) -> bool:
        """Whether it is no factor but a tensor of the base."""
        return self.part.startswith("base ")


def plain_path(path: str) -> str:
    """`path` without segments that are only wrappers, and without all up to and including "base_model.model."."""
    kept = ".".join(segment for segment in path.split(".") if segment not in _WRAPPERS)
    return _PEFT_PREFIX.sub("", kept, count=1)


@lru_cache(maxsize=8192)
def parse_key(key: str) -> FactorKey:
    """The parts of a key such as "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".

    PEFT drops the adapter's name ("lora_A.default.weight") when it saves; files written by hand may still have it.
    Raises InvalidAdapter that names the key.
    """
    without_name = _NAMED.sub(r"\1", key)
    for mark, message in _REFUSED_KEYS:
        if mark in without_name:
            raise _unsupported(key, message)
    plain = plain_path(key)
    match = _FACTOR.fullmatch(plain) or _MAGNITUDE.fullmatch(plain)
    part = match and _part(match)
    if match is None and "lora_" not in plain and (base := _OF_BASE.fullmatch(plain)) is not None:
        return FactorKey(key, base["module"], f"base {base['kind']}", base["module"])
    if match is None or part is None:
        raise _unsupported(
            key,
            "is neither lora_A.weight, lora_B.weight, lora_B.bias nor lora_magnitude_vector of a linear layer; save "
            "the adapter with PEFT's save_pretrained(..., save_embedding_layers=False), trained with bias='none' and "
            "without modules_to_save",
        )
    if match["module"].rpartition(".")[2] in HEADS_AND_EMBEDDINGS:
        raise _unsupported(
            key,
            "targets an embedding or the output head, which all adapters share; train with linear layers only, e.g. "
            "target_modules='all-linear'",
        )
    seen = _PEFT_PREFIX.sub("", key, count=1).rpartition(".lora_")[0]
    return FactorKey(key, match["module"], part, seen)


def _part(match: re.Match[str]) -> str | None:
    """What FactorKey calls it; None for a bias of A, which LoRA does not have."""
    if match.re is _MAGNITUDE:
        return "magnitude"
    if match["kind"] == "weight":
        return match["part"]
    return "bias" if match["part"] == "B" else None


def match_sites(keys: Sequence[FactorKey], sites: Sequence[Site]) -> dict[str, Site]:
    """The site of every module that `keys` name.

    Modules match by their full path. If none does, one segment that names the language model of a multimodal one may
    be too much in all of them, and one prefix may be missing from all (an adapter that was trained on AutoModel,
    without "model.") or be too much in all, if exactly one prefix fits. Raises InvalidAdapter that names the first key
    without a site, and the sites that its layer does have.
    """
    by_name = {plain_path(site.name): site for site in sites}
    modules = list(dict.fromkeys(key.module for key in keys))
    if not modules:
        raise InvalidAdapter(WEIGHTS_FILE, "has no tensors of LoRA", reason="CORRUPT_ADAPTER")
    _check_towers(keys, by_name)
    if not any(module in by_name for module in modules):
        for paths in (modules, [_without_tower(module) for module in modules]):
            found = _fit(paths, by_name)
            if found is not None:
                if len({site.index for site in found}) != len(found):
                    raise _mismatch(modules[0], "and others of the file fit the same layer of the base")
                return dict(zip(modules, found, strict=True))
    for key in keys:
        if key.module not in by_name:
            near = _neighbours(key.module, by_name)
            raise _mismatch(key.key, f"matches no linear layer of the base: was it trained on another one? {near}")
    return {module: by_name[module] for module in modules}


def _check_towers(keys: Sequence[FactorKey], by_name: Mapping[str, Site]) -> None:
    """Raises InvalidAdapter for tensors of a multimodal model's other parts."""
    others = {key.key: _OTHER_TOWERS.intersection(key.module.split(".")) for key in keys if key.module not in by_name}
    first = next((key for key, towers in others.items() if towers), None)
    if first is not None:
        towers = sorted(set().union(*others.values()))
        dropped = dropping(f"not {{{str(towers)[1:-1]}}} & set(k.split('.'))")
        raise _mismatch(
            first,
            f"belongs to another part of a multimodal model ({', '.join(towers)}), and this server has the language "
            "model alone. Leave that part out in training (exclude_modules), or, if texts are all that the adapter is "
            f"for, drop its tensors: in a copy of the folder, {dropped}",
        )


def dropping(kept: str) -> str:
    """The command that keeps of the weights the tensors for whose key k the expression `kept` holds."""
    return (
        f"python -c \"import safetensors.torch; f = '{WEIGHTS_FILE}'; safetensors.torch.save_file({{k: v for k, v in "
        f'safetensors.torch.load_file(f).items() if {kept}}}, f)"'
    )


def _without_tower(module: str) -> str:
    segments = module.split(".")
    tower = next((i for i, segment in enumerate(segments) if segment in _TOWERS), None)
    return module if tower is None else ".".join(segments[:tower] + segments[tower + 1 :])


def _fit(paths: list[str], by_name: dict[str, Site]) -> list[Site] | None:
    """The sites of `paths` as they are, or with the one prefix that has to be added or taken away; None without one."""
    if all(path in by_name for path in paths):
        return [by_name[path] for path in paths]
    fits = list(_prefixed(paths, by_name))
    if len(fits) > 1:
        raise _mismatch(paths[0], f"fits the base in {len(fits)} places: {', '.join(fit[0].name for fit in fits)}")
    return fits[0] if fits else None


def _prefixed(paths: list[str], by_name: dict[str, Site]) -> Iterable[list[Site]]:
    """Every way to match all paths by adding one prefix to them, or by taking one away."""
    first = paths[0]
    for name in by_name:
        if name.endswith(f".{first}"):
            added = name.removesuffix(first)
            if all(added + path in by_name for path in paths):
                yield [by_name[added + path] for path in paths]
        elif first.endswith(f".{name}"):
            taken = first.removesuffix(name)
            if all(p.startswith(taken) and p.removeprefix(taken) in by_name for p in paths):
                yield [by_name[path.removeprefix(taken)] for path in paths]


def _neighbours(module: str, by_name: dict[str, Site]) -> str:
    layer = _LAYER.match(module)
    near = [name for name in by_name if layer and name.startswith(f"{layer[1]}.")]
    if near:
        return f"{layer[1] if layer else ''} has {', '.join(near)}"
    names = list(by_name)
    return f"the base has {len(names)}, from {names[0]} to {names[-1]}" if names else "the base has none"


def _unsupported(key: str, message: str) -> InvalidAdapter:
    return InvalidAdapter(key, message, reason="UNSUPPORTED_ADAPTER")


def _mismatch(key: str, message: str) -> InvalidAdapter:
    return InvalidAdapter(key, message, reason="BASE_MISMATCH")

"""Which site of the base a tensor of an adapter belongs to. Knows names only; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from loramux.errors import InvalidAdapter
from loramux.lora.roots import WEIGHTS_FILE
from loramux.ops.site import Site

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.(?P<kind>weight|bias)")
# PEFT writes no ".weight" here; files from other hands may have it.
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
_LAYER = re.compile(r"(.*?\.\d+)\.")
_PEFT_PREFIX = "base_model.model."
_HEADS_AND_EMBEDDINGS = frozenset({"lm_head", "embed_out", "embed_tokens", "wte", "wpe", "embed_in"})

# What a key that is no factor of a linear layer tells, and the way out.
_REFUSED_KEYS = (
    ("lora_diag", "belongs to KaSA, which trains on a changed base; train plain LoRA, with kasa_config unset"),
    ("lora_velora", "matters for training only; drop the lora_velora_embed tensors from the file"),
    ("lora_monteclora", "matters for training only; drop the lora_monteclora_sampler tensors from the file"),
    ("lora_embedding_", "targets an embedding, which all adapters share; train with linear layers only"),
    (
        "modules_to_save",
        "replaces a module of the base, which all adapters share; train without modules_to_save",
    ),
    (
        ".base_layer.",
        "targets a parameter that is not a linear layer; use target_modules, not target_parameters",
    ),
)


@dataclass(frozen=True, slots=True)
class FactorKey:
    """A key of the file, taken apart. `module` is the path in the model that the adapter was trained on."""

    key: str
    module: str
    part: str


@lru_cache(maxsize=8192)
def parse_key(key: str) -> FactorKey:
    """The parts of a key such as "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".

    `part` is "A", "B", "bias" (of B) or "magnitude" (of DoRA). PEFT drops the adapter's name ("lora_A.default.weight")
    when it saves; files written by hand may still have it. Raises InvalidAdapter that names the key.
    """
    for mark, message in _REFUSED_KEYS:
        if mark in key:
            raise _unsupported(key, message)
    match = _FACTOR.fullmatch(key) or _MAGNITUDE.fullmatch(key)
    part = match and _part(match)
    if match is None or part is None:
        raise _unsupported(
            key,
            "is neither lora_A.weight, lora_B.weight, lora_B.bias nor lora_magnitude_vector of a linear layer; save "
            "the adapter with PEFT's save_pretrained(..., save_embedding_layers=False), trained with bias='none' and "
            "without modules_to_save",
        )
    module = match["module"].removeprefix(_PEFT_PREFIX)
    if module.rpartition(".")[2] in _HEADS_AND_EMBEDDINGS:
        raise _unsupported(
            key,
            "targets an embedding or the output head, which all adapters share; train with linear layers only, e.g. "
            "target_modules='all-linear'",
        )
    return FactorKey(key, module, part)


def _part(match: re.Match[str]) -> str | None:
    """What FactorKey calls it; None for a bias of A, which LoRA does not have."""
    if match.re is _MAGNITUDE:
        return "magnitude"
    if match["kind"] == "weight":
        return match["part"]
    return "bias" if match["part"] == "B" else None


def match_sites(keys: Sequence[FactorKey], sites: Sequence[Site]) -> dict[str, Site]:
    """The site of every module that `keys` name.

    Modules match by their full path. If none does, one prefix may be missing from all of them (an adapter that was
    trained on AutoModel, without "model.") or be too much in all of them, if exactly one prefix fits. Raises
    InvalidAdapter that names the first key without a site, and the sites that its layer does have.
    """
    by_name = {site.name: site for site in sites}
    modules = dict.fromkeys(key.module for key in keys)
    if not modules:
        raise InvalidAdapter(WEIGHTS_FILE, "has no tensors", reason="CORRUPT_ADAPTER")
    if not any(module in by_name for module in modules):
        fits = list(_prefixed(list(modules), by_name))
        if len(fits) == 1:
            return fits[0]
        if fits:
            first = next(iter(modules))
            raise _mismatch(first, f"fits the base in {len(fits)} places: {', '.join(f[first].name for f in fits)}")
    for key in keys:
        if key.module not in by_name:
            near = _neighbours(key.module, by_name)
            raise _mismatch(key.key, f"matches no linear layer of the base: was it trained on another one? {near}")
    return {module: by_name[module] for module in modules}


def _prefixed(modules: list[str], by_name: dict[str, Site]) -> Iterable[dict[str, Site]]:
    """Every way to match all modules by adding one prefix to them, or by taking one away."""
    first = modules[0]
    for name in by_name:
        if name.endswith(f".{first}"):
            added = name.removesuffix(first)
            if all(added + module in by_name for module in modules):
                yield {module: by_name[added + module] for module in modules}
        elif first.endswith(f".{name}"):
            taken = first.removesuffix(name)
            if all(m.startswith(taken) and m.removeprefix(taken) in by_name for m in modules):
                yield {module: by_name[module.removeprefix(taken)] for module in modules}


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

"""Sentences about an adapter that can be served and is hardly meant so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from loramux.errors import LoramuxError
from loramux.lora.base import Base
from loramux.lora.matching import HEADS_AND_EMBEDDINGS
from loramux.lora.peft_config import PeftConfig, shown
from loramux.lora.selection import Selection
from loramux.ops.site import Site

if TYPE_CHECKING:
    from loramux.lora.peft_files import SiteFactors

OTHER_TEMPLATE = (
    "its folder has a chat template of its own, other than the base's, which messages are rendered with; start the "
    "server with --adapter-chat-templates to use it, or send prompts in its form"
)
_MOST_NAMED = 16
_NOTHING = 1e-12  # of a product of two factors: float32 rounds weights of usual size by a thousand times that
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What those who quantize or convert a model put after its name or before it.
_SAME_MODEL = re.compile(
    r"^meta-|[-_.](unsloth|bnb|4bit|8bit|nf4|int4|int8|fp8|fp16|bf16|gptq|awq|gguf|hf|q\d\w*)(?=$|[-_.])", re.IGNORECASE
)


def unusable_template(error: LoramuxError) -> str:
    """Said where the folder's own chat template cannot be looked at."""
    return f"messages are rendered with the base's chat template, whatever its folder has: {error.message}"


def warnings_of(
    config: PeftConfig,
    selected: Selection,
    paths: Mapping[str, tuple[str, ...]],
    factors: Sequence[SiteFactors],
    sites: Sequence[Site],
    base: Base,
) -> list[str]:
    """All that config, factors and base tell. `paths`: by module, what it is known by, its name in this base last."""
    found = (
        _effect(config, factors),
        _fewer(config, selected, paths, factors, sites),
        _heads(config, sites),
        _unmatched("rank_pattern", config, paths),
        _unmatched("alpha_pattern", config, paths),
        _switched_on(config),
        _other_base(config, base),
    )
    return [sentence for sentence in found if sentence is not None]


def _effect(config: PeftConfig, factors: Sequence[SiteFactors]) -> str | None:
    quiet = [f for f in factors if not _has_effect(f)]
    if not quiet:
        return None
    which = "it has no effect" if len(quiet) == len(factors) else f"{len(quiet)} of {len(factors)} layers: no effect"
    if all(f.scale == 0 for f in quiet):
        return f"{which}: lora_alpha or alpha_pattern is 0, so the scale is zero; was it exported with its alpha?"
    if all(f.scale != 0 and _largest(f.a) * _largest(f.b) > _NOTHING for f in quiet):
        return f"{which}: lora_alpha is so small that nothing is left ({shown(config.lora_alpha)}); was it exported so?"
    zeros = "lora_A or lora_B is all zero" if all(f.scale != 0 for f in quiet) else "lora_B or lora_alpha is zero"
    return f"{which}: {zeros}, e.g. in {quiet[0].site.name}; was the checkpoint written before any training step?"


def _has_effect(f: SiteFactors) -> bool:
    """Whether it changes anything: a factor may be zero, or all that they give too small beside any weight."""
    if f.magnitude is not None or (f.bias is not None and _largest(f.bias) * abs(f.scale) > _NOTHING):
        return True
    return _largest(f.b) * abs(f.scale) * _largest(f.a) > _NOTHING


def _largest(tensor: torch.Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def _fewer(
    config: PeftConfig,
    selected: Selection,
    paths: Mapping[str, tuple[str, ...]],
    factors: Sequence[SiteFactors],
    sites: Sequence[Site],
) -> str | None:
    if config.target_modules is None:
        return (
            "target_modules is not set, so all layers with tensors are changed; PEFT would change only those that it "
            "knows as usual for this family"
        )
    has = {f.site.index for f in factors}
    trained, here = _prefixes(next(iter(paths.values())))
    missing = [
        site
        for site in sites
        if site.index not in has
        and selected.left_out_by(tuple({site.name, trained + site.name.removeprefix(here)})) is None
    ]
    if not missing:
        return None
    names = sorted({site.name.rpartition(".")[2] for site in missing})
    more = ", …" if len(names) > _MOST_NAMED else ""
    return (
        f"the file has no tensors for {len(missing)} of the {len(missing) + len(has)} layers that target_modules "
        f"selects ({', '.join(names[:_MOST_NAMED])}{more}; the first is {missing[0].name}); they stay the base's"
    )


def _heads(config: PeftConfig, sites: Sequence[Site]) -> str | None:
    """Tensors for these are refused where they are; a name without tensors changes nothing."""
    targets = config.target_modules if isinstance(config.target_modules, list) else [config.target_modules or ""]
    named = sorted({end for t in targets if (end := t.rpartition(".")[2]) in HEADS_AND_EMBEDDINGS})
    named = [name for name in named if not any(f".{site.name}".endswith(f".{name}") for site in sites)]
    if not named:
        return None
    return f"target_modules names {', '.join(named)}, for which the file has no tensors; they stay the base's"


def _prefixes(paths: tuple[str, ...]) -> tuple[str, str]:
    """What the module's path in training begins with where its name in this base begins with another."""
    trained, here = paths[0].split("."), paths[-1].split(".")
    same = 0
    while same < min(len(trained), len(here)) and trained[-1 - same] == here[-1 - same]:
        same += 1
    ends = ("".join(f"{segment}." for segment in path[: len(path) - same]) for path in (trained, here))
    return next(ends), next(ends)


def _unmatched(field: str, config: PeftConfig, paths: Mapping[str, tuple[str, ...]]) -> str | None:
    patterns = getattr(config, field).unmatched(list(paths.values()))
    if not patterns:
        return None
    return f"{field} has {len(patterns)} patterns that match no layer of the file, e.g. {shown(patterns[0])}"


def _switched_on(config: PeftConfig) -> str | None:
    fields = [field for field in config.switched_on if field != "bias"]
    if not fields:
        return None
    return (
        f"{', '.join(fields)} of adapter_config.json ask for tensors beside LoRA's, and the file has none but "
        "the base's own; it is served as the plain LoRA that it holds"
    )


def _other_base(config: PeftConfig, base: Base) -> str | None:
    named = config.base_model_name_or_path
    if not isinstance(named, str) or not (_HUB_ID.fullmatch(named) and _HUB_ID.fullmatch(base.name)):
        return None
    if _plain_name(named) == _plain_name(base.name):
        return None
    return f"it was trained on {shown(named)} by its adapter_config.json, and this server serves {shown(base.name)}"


def _plain_name(hub_id: str) -> str:
    """The model's name without who published it and what it was converted to."""
    return _SAME_MODEL.sub("", hub_id.partition("/")[2]).lower()

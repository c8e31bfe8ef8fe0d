"""Turns the skeleton into a served model: sites for linear layers, paged attention, fused groups."""

from __future__ import annotations

from itertools import groupby

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramux.errors import UnsupportedModel
from loramux.model.modules import LinearGroup, SiteLinear
from loramux.model.skeleton import decoder_layers
from loramux.model.step import Step
from loramux.ops.site import Site

# Names of sibling layers that share their input, in the order the skeleton applies them.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def place_sites(model: PreTrainedModel) -> tuple[SiteLinear, ...]:
    """Replace every linear layer of the decoder by an empty SiteLinear of the same name; in module order.

    Raises UnsupportedModel for layers whose big weights are not linear modules (mixture-of-experts tensors).
    """
    path, layers = decoder_layers(model)
    sites: list[SiteLinear] = []
    for name, module in list(layers.named_modules(prefix=path)):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2:
                raise UnsupportedModel(
                    f"{model.config.model_type}: {name}.{parameter_name} has {parameter.ndim} dimensions "
                    "(mixture-of-experts weights); loramux quantizes linear layers only"
                )
        if isinstance(module, nn.Linear):
            site = Site(len(sites), name, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            site = Site(len(sites), name, module.nx, module.nf, transposed=True)
        else:
            continue
        linear = SiteLinear(site, module.bias is not None)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
        sites.append(linear)
    if not sites:
        raise UnsupportedModel(f"{model.config.model_type}: no linear layers in {path}")
    return tuple(sites)


def connect(model: PreTrainedModel, linears: tuple[SiteLinear, ...], step: Step) -> None:
    """Group the filled sites and give every layer the step it reads."""
    for parent, members in groupby(linears, key=lambda m: m.site.name.rpartition(".")[0]):
        siblings = {m.site.name.removeprefix(parent + "."): m for m in members}
        for names in FUSED:
            if all(n in siblings for n in names):
                group = [siblings.pop(n) for n in names]
                if len({m.in_features for m in group}) == 1:
                    LinearGroup(group, step)
                else:
                    siblings |= dict(zip(names, group, strict=True))
        for linear in siblings.values():
            LinearGroup([linear], step)
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            object.__setattr__(module, "loramux_step", step)

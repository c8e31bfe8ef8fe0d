"""The modules that take the place of the skeleton's linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from loramux.model.step import Step
from loramux.ops.backend import LinearPart
from loramux.ops.site import Site


class SiteLinear(nn.Module):
    """One site, under the name of the layer it replaces. Its weight lives in the group, outside torch's parameters,
    so that nothing (no .to(), no state_dict, no first forward) can repack it."""

    def __init__(self, site: Site, has_bias: bool) -> None:
        super().__init__()
        self.site = site
        self.has_bias = has_bias
        self.in_features = site.in_features
        self.out_features = site.out_features
        self.part: LinearPart | None = None
        self.group: LinearGroup | None = None
        self.place = 0

    def forward(self, x: Tensor) -> Tensor:
        assert self.group is not None
        return self.group.output(self.place, x)

    def dequantize(self) -> Tensor:
        """A fresh float32 [out_features, in_features] of the NF4 weight. Any thread may call it."""
        assert self.group is not None
        return self.group.linear.dequantize(self.place)

    def extra_repr(self) -> str:
        return f"{self.site.name}, {self.in_features} → {self.out_features}, nf4"


class LinearGroup:
    """Sites that the skeleton applies to the same input one after another (q/k/v, gate/up), computed in one call.

    The first site that is asked computes all; the others take their outputs. A site that is asked with another
    input, as an unusual model may do, gets a computation of its own: slower, never wrong.
    """

    def __init__(self, members: Sequence[SiteLinear], step: Step) -> None:
        parts = []
        for place, member in enumerate(members):
            assert member.part is not None
            parts.append(member.part)
            # From here on the operation owns the weight; it may keep it in another layout of the same size.
            member.part, member.group, member.place = None, self, place
        self.linear = step.backend.prepare(parts, [m.site.index for m in members])
        self.bias_bytes = sum(p.bias.numel() * p.bias.element_size() for p in parts if p.bias is not None)
        self._step = step
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of member `place` for x [..., K]: [..., N] in x's dtype."""
        if self._input is not x or self._outputs[place] is None:
            outputs = self.linear(x.reshape(-1, x.shape[-1]), self._step.segments)
            self._outputs = [y.view(*x.shape[:-1], -1) for y in outputs]
            self._input = x
        y = self._outputs[place]
        assert y is not None
        self._outputs[place] = None
        if not any(output is not None for output in self._outputs):
            self._input = None
        return y

"""An adapter where the model computes: one immutable buffer, and views into it.

Knows tensors; not files, names or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loramux.errors import InvalidAdapter
from loramux.lora.host_memory import allocate
from loramux.lora.layout import ALIGN_BYTES, Factors, Offsets, lay_out
from loramux.lora.peft_files import AdapterFiles, SiteFactors, all_finite
from loramux.lora.staging import to_device
from loramux.ops.segment import AdapterWeights, LoraWeights
from loramux.ops.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter on a device. Nothing of it is written after `build`.

    buffer   [elements] of the compute dtype: all factors (lora.layout); starts at a 64-byte boundary
    weights  site index → views into the buffer; alpha / r (or alpha / sqrt(r)) is folded into b and bias
    offsets  int64 [n_sites, 4] on the CPU: where A, B, bias and scale start, in elements; -1 where there is none
    ranks    int32 [n_sites] on the CPU: 0 where the adapter leaves the site alone
    host     the same adapter in the host's memory, if it was kept there beside the device's
    warnings, chat_template  see AdapterFiles
    """

    buffer: Tensor
    weights: AdapterWeights
    offsets: Tensor
    ranks: Tensor
    digest: str
    target_modules: tuple[str, ...]
    host: Adapter | None = None
    warnings: tuple[str, ...] = ()
    chat_template: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device: the buffer, exactly."""
        return self.buffer.numel() * self.buffer.element_size()

    @property
    def max_rank(self) -> int:
        """The largest rank of its sites."""
        return int(self.ranks.max())

    @property
    def site_count(self) -> int:
        """Linear layers that it changes."""
        return len(self.weights)

    @property
    def on_host(self) -> Adapter | None:
        """The same adapter in the host's memory: itself where that is the device's; None if none was kept."""
        return self if self.buffer.device.type == "cpu" else self.host

    @property
    def mixable(self) -> bool:
        """Whether what it adds can be added to what others add: not so for DoRA."""
        return all(weights.scale is None for weights in self.weights.values())

    @classmethod
    def build(
        cls,
        files: AdapterFiles,
        sites: Sequence[Site],
        device: torch.device,
        dtype: torch.dtype,
        dequantize: Callable[[Site], Tensor] | None = None,
        *,
        keep: bool = False,
    ) -> Adapter:
        """Lay out, scale and cast on the host, then `place`.

        `dequantize` gives a fresh float32 [out, in] of a site's weight, on any device; only DoRA needs it, and holds
        one at a time. Raises InvalidAdapter for a tensor whose scaled numbers do not fit into `dtype`, and for a DoRA
        magnitude that does not fit the base.
        """
        layout = lay_out([_factors(f) for f in files.factors], dtype.itemsize)
        host = torch.frombuffer(allocate(layout.elements * dtype.itemsize), dtype=dtype, count=layout.elements)
        offsets = [(-1, -1, -1, -1)] * len(sites)
        ranks = [0] * len(sites)
        written: dict[int, LoraWeights] = {}
        for f in files.factors:
            assert sites[f.site.index] == f.site, "sites are numbered by their place"
            at = layout.offsets[f.site.index]
            views = written[f.site.index] = _views(host, at, f.rank, f.site)
            views.a.unflatten(1, (-1, f.pooling)).copy_(f.a.unsqueeze(2))
            # The product is taken in fp32, so that the compute dtype rounds once; of one dtype, torch does so itself.
            torch.mul(f.b if f.b.dtype == dtype else f.b.float(), f.scale, out=views.b)
            if views.bias is not None and f.bias is not None:
                views.bias.copy_(f.bias.float() * f.scale)
            if views.scale is not None:
                assert dequantize is not None, "DoRA needs the base's weights"
                weight = dequantize(f.site)
                f.add_to(weight)
                views.scale.copy_(f.output_scale(weight))
            offsets[f.site.index] = at.a, at.b, at.bias, at.scale
            ranks[f.site.index] = f.rank
        if not all_finite(host):  # or scales, whose halves mean nothing as numbers of `dtype`
            for f in files.factors:
                _check_finite(f.site, written[f.site.index])
        assert host.data_ptr() % ALIGN_BYTES == 0, "pages start at such boundaries"
        weights = AdapterWeights(host, torch.tensor(offsets), torch.tensor(ranks, dtype=torch.int32), written)
        targets = tuple(sorted({f.site.name.rpartition(".")[2] for f in files.factors}))
        told = files.warnings, files.chat_template
        adapter = cls(host, weights, weights.offsets, weights.ranks, files.digest, targets, None, *told)
        return adapter.place(device, keep=keep)

    def place(self, device: torch.device, *, keep: bool) -> Adapter:
        """This adapter, which is in the host's memory, on `device`: one allocation, all of it there on return.

        keep: have the result hold on to this one, so that it can be put out of the device and placed again.
        """
        if device.type == "cpu":
            return self
        buffer = to_device(self.buffer, device)
        assert buffer.data_ptr() % ALIGN_BYTES == 0, "what torch allocates starts at such boundaries"
        views = {site: _moved(weights, buffer) for site, weights in self.weights.items()}
        weights = replace(self.weights, buffer=buffer, views=views)
        return replace(self, buffer=buffer, weights=weights, host=self if keep else None)


def _factors(f: SiteFactors) -> Factors:
    return Factors(f.site, f.rank, f.bias is not None, f.magnitude is not None)


def _views(buffer: Tensor, at: Offsets, rank: int, site: Site) -> LoraWeights:
    rows, columns = site.out_features, site.in_features
    return LoraWeights(
        a=buffer[at.a : at.a + rank * columns].view(rank, columns),
        b=buffer[at.b : at.b + rows * rank].view(rows, rank),
        bias=None if at.bias < 0 else buffer[at.bias : at.bias + rows],
        scale=None if at.scale < 0 else buffer[at.scale :].view(torch.float32)[:rows],
    )


def _moved(weights: LoraWeights, buffer: Tensor) -> LoraWeights:
    """The same views into another buffer."""

    def moved(view: Tensor) -> Tensor:
        return buffer.view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset())

    return LoraWeights(
        a=moved(weights.a),
        b=moved(weights.b),
        bias=None if weights.bias is None else moved(weights.bias),
        scale=None if weights.scale is None else moved(weights.scale),
    )


def _check_finite(site: Site, views: LoraWeights) -> None:
    """Raises InvalidAdapter for the first tensor with a number that its dtype cannot hold."""
    for name, tensor in (("lora_A", views.a), ("lora_B", views.b), ("lora_B.bias", views.bias)):
        if tensor is not None and not all_finite(tensor):
            raise InvalidAdapter(
                f"{site.name}.{name}",
                f"has numbers that do not fit into {tensor.dtype} once scaled; serve in bfloat16 or float32, or lower "
                "lora_alpha",
                reason="NOT_FINITE",
            )

"""An adapter where the model computes: one immutable buffer, and views into it.

Knows tensors; not files, names or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux.errors import InvalidAdapter
from loramux.lora.layout import ALIGN_BYTES, Factors, Layout, Offsets, lay_out
from loramux.lora.peft_files import AdapterFiles, all_finite
from loramux.ops.segment import AdapterWeights, LoraWeights
from loramux.ops.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter on a device. Nothing of it is written after `build`.

    buffer   [elements] of the compute dtype: all factors (lora.layout); starts at a 64-byte boundary
    weights  site index → views into the buffer; alpha / r (or alpha / sqrt(r)) is folded into b and bias
    offsets  int64 [n_sites, 3] on the CPU: where A, B and bias start, in elements; -1 where there is none
    ranks    int32 [n_sites] on the CPU: 0 where the adapter leaves the site alone
    """

    buffer: Tensor
    weights: AdapterWeights
    offsets: Tensor
    ranks: Tensor
    digest: str
    target_modules: tuple[str, ...]

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
    def stays_on_host(self) -> bool:
        """Whether the device's memory is the host's."""
        return self.buffer.device.type == "cpu"

    @classmethod
    def build(cls, files: AdapterFiles, sites: Sequence[Site], device: torch.device, dtype: torch.dtype) -> Adapter:
        """Lay out, scale and cast on the host, then place with one allocation and one copy.

        Raises InvalidAdapter for a tensor whose scaled numbers do not fit into `dtype`.
        """
        layout = lay_out([Factors(f.site, f.rank, f.bias is not None) for f in files.factors], dtype.itemsize)
        host = torch.zeros(layout.elements, dtype=dtype)
        offsets = torch.full((len(sites), 3), -1, dtype=torch.int64)
        ranks = torch.zeros(len(sites), dtype=torch.int32)
        for f in files.factors:
            assert sites[f.site.index] == f.site, "sites are numbered by their place"
            at = layout.offsets[f.site.index]
            views = _views(host, at, f.rank, f.site)
            views.a.copy_(f.a)
            # The product is taken in fp32, so that the compute dtype rounds once.
            views.b.copy_(f.b.float() * f.scale)
            if views.bias is not None and f.bias is not None:
                views.bias.copy_(f.bias.float() * f.scale)
            offsets[f.site.index] = torch.tensor([at.a, at.b, at.bias])
            ranks[f.site.index] = f.rank
        if not all_finite(host):
            raise _overflow(files, layout, host)
        buffer = host.to(device)
        assert buffer.data_ptr() % ALIGN_BYTES == 0, "torch allocates at 64-byte boundaries"
        factors = {f.site.index: _views(buffer, layout.offsets[f.site.index], f.rank, f.site) for f in files.factors}
        weights = AdapterWeights(buffer, offsets, ranks, factors)
        targets = tuple(sorted({f.site.name.rpartition(".")[2] for f in files.factors}))
        return cls(buffer, weights, offsets, ranks, files.digest, targets)


def _views(buffer: Tensor, at: Offsets, rank: int, site: Site) -> LoraWeights:
    rows, columns = site.out_features, site.in_features
    return LoraWeights(
        a=buffer[at.a : at.a + rank * columns].view(rank, columns),
        b=buffer[at.b : at.b + rows * rank].view(rows, rank),
        bias=None if at.bias < 0 else buffer[at.bias : at.bias + rows],
    )


def _overflow(files: AdapterFiles, layout: Layout, host: Tensor) -> InvalidAdapter:
    """The error for the first tensor with a number that the compute dtype cannot hold."""
    for f in files.factors:
        views = _views(host, layout.offsets[f.site.index], f.rank, f.site)
        for name, tensor in (("lora_A", views.a), ("lora_B", views.b), ("lora_B.bias", views.bias)):
            if tensor is not None and not all_finite(tensor):
                return InvalidAdapter(
                    f"{f.site.name}.{name}",
                    f"has numbers that do not fit into {host.dtype} once scaled; serve in bfloat16 or float32, or "
                    "lower lora_alpha",
                    reason="NOT_FINITE",
                )
    raise AssertionError("what lies between the tensors is zero")

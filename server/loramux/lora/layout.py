"""Where an adapter's factors lie in its one flat buffer. Integers only; imports no torch.

Sites are taken by index. Neighbours that share their input (one parent module, one width: q, k, v; gate, up) form a
group, and a group is laid out as all A's, then all B's, all biases, all scales, so that the A's of a fused linear are
adjacent and may be read as one matrix. Every tensor starts at a 64-byte boundary (a cache line, and more than any
vector load needs), and takes whole lines; the bytes in between are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from loramux.ops.site import Site

ALIGN_BYTES = 64
SCALE_BYTES = 4


def aligned(nbytes: int) -> int:
    """Bytes that a tensor of `nbytes` takes in the buffer."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter has at one site: its rank, whether B has a bias, and whether outputs have a scale (DoRA)."""

    site: Site
    rank: int
    bias: bool = False
    scale: bool = False


@dataclass(frozen=True, slots=True)
class Offsets:
    """Where one site's tensors start, in elements from the buffer's beginning.

    bias and scale are -1 where there is none. A scale is float32, whatever the elements are.
    """

    a: int
    b: int
    bias: int
    scale: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The offsets by site index, and the whole buffer's length in elements."""

    offsets: dict[int, Offsets]
    elements: int


def lay_out(factors: Sequence[Factors], item_bytes: int) -> Layout:
    """The layout for elements of `item_bytes`; `factors` in the order of their sites' indices."""
    assert ALIGN_BYTES % item_bytes == 0
    assert all(x.site.index < y.site.index for x, y in pairwise(factors)), "out of order"
    end = 0

    def place(elements: int, of_bytes: int = item_bytes) -> int:
        nonlocal end
        start = end
        end += aligned(elements * of_bytes) // item_bytes
        return start

    offsets: dict[int, Offsets] = {}
    for _, run in groupby(factors, key=_input_of):
        group = list(run)
        a = [place(f.rank * f.site.in_features) for f in group]
        b = [place(f.site.out_features * f.rank) for f in group]
        bias = [place(f.site.out_features) if f.bias else -1 for f in group]
        scale = [place(f.site.out_features, SCALE_BYTES) if f.scale else -1 for f in group]
        offsets |= {f.site.index: Offsets(*at) for f, *at in zip(group, a, b, bias, scale, strict=True)}
    return Layout(offsets, end)


def _input_of(factors: Factors) -> tuple[str, int]:
    return factors.site.name.rpartition(".")[0], factors.site.in_features

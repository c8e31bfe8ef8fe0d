"""Tensors of the base itself that were saved beside an adapter's factors: let pass where they are the base's own.

PEFT saves the embeddings by itself when a vocabulary was resized, if only to a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from loramux.errors import InvalidAdapter
from loramux.lora.base import Base
from loramux.lora.matching import FactorKey, dropping

_ROWS = 4096  # that are compared at a time


def check_saved(tensors: Sequence[tuple[FactorKey, Tensor]], base: Base) -> list[str]:
    """Warnings about tensors that are the base's own where it has them, and have rows beyond, or lack some.

    Raises InvalidAdapter for a tensor that is not the base's own.
    """
    notes = []
    for key, saved in tensors:
        name = f"{key.module}.{key.part.removeprefix('base ')}"
        own = _find(name, base.dense)
        if own is None or not _same(saved, own):
            raise InvalidAdapter(
                key.key,
                "is a tensor of the base, which all adapters share, and not of LoRA"
                + ("; it differs from the base's own" if own is not None else "")
                + ". If it was not trained but only saved (PEFT saves embeddings when the vocabulary was resized), "
                "drop it: in a copy of the folder, " + dropping("'.lora_' in k"),
                reason="UNSUPPORTED_ADAPTER",
            )
        if len(saved) != len(own):
            notes.append(
                f"{key.key} has {len(saved)} rows and the base {len(own)}; those of both are equal, the others are "
                "left out: tokens that training added do not exist here"
            )
    return notes


def _find(name: str, dense: Mapping[str, Tensor]) -> Tensor | None:
    """The base's tensor of that name, or the only one whose name ends alike where a prefix differs."""
    if name in dense:
        return dense[name]
    end = ".".join(name.split(".")[-2:])
    alike = [own for own in dense if f".{own}".endswith(f".{end}")]
    return dense[alike[0]] if len(alike) == 1 else None


def _same(saved: Tensor, own: Tensor) -> bool:
    """Whether the rows that both have are equal, in the precision that the base is served in."""
    if saved.dim() == 0 or saved.shape[1:] != own.shape[1:]:
        return False
    return all(torch.equal(saved[rows].to(own.dtype), own[rows].cpu()) for rows in _pieces(min(len(saved), len(own))))


def _pieces(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))

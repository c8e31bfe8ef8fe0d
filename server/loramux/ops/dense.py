"""A dense weight in a quantized model: of a layer that an adapter was merged into, which NF4 would undo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight:
    """An [out_features, in_features] matrix as it is, in place of an NF4Weight; immutable.

    values  [N, K] contiguous, in the compute dtype where operations run
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def numel(self) -> int:
        """Weights."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.values.numel() * self.values.element_size()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A fresh copy of the matrix in `dtype`."""
        return self.values.to(dtype, copy=True)

"""The NF4 weight: what a quantized linear layer is at rest.

NF4 is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): the row-major weight is cut into
blocks of 64 values; each block stores one scale (absmax) and 4-bit indices into a table of 16 values in [-1, 1].
With double quantization the absmax values themselves are 8-bit indices, in nested blocks of 256, with one fp32 scale
a nested block and one fp32 offset (their mean) a tensor: 4 + 8/64 + 32/(64·256) ≈ 4.127 bits per weight. The format
is that of bitsandbytes, so checkpoints interchange both ways; the codes are never unpacked in memory.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Its CPU backend warns at import that the package `kernels` is missing. It must stay missing: with it, importing
# bitsandbytes would fetch native code from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# At import it hands functions to torch.compile, which would load torch's compiler at every start and run a C++ compiler
# for each new shape of a weight whose rows are no multiple of a block, while requests wait. Uncompiled they do as well.
_compile, torch.compile = torch.compile, lambda function, **options: function  # type: ignore[assignment]
try:
    from bitsandbytes import functional as bnb
finally:
    torch.compile = _compile

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
STATE_KEY = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, slots=True, eq=False)
class NF4Weight:
    """An [out_features, in_features] matrix in NF4; immutable.

    codes         uint8 [ceil(N·K/2)]    two indices a byte, the first in the high nibble
    absmax        uint8 [N·K/64] with double quantization, else float32 of the same shape
    table         float32 [16]           the NF4 values
    nested_absmax float32 [blocks/256]   or None without double quantization
    nested_table  float32 [256]          bitsandbytes' dynamic 8-bit map, or None
    offset        float32 []             added to every absmax, or None
    """

    shape: tuple[int, int]
    codes: Tensor
    absmax: Tensor
    table: Tensor
    nested_absmax: Tensor | None = None
    nested_table: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def quantize(cls, weight: Tensor) -> NF4Weight:
        """Quantize a dense [N, K] matrix of any float dtype, with double quantization.

        Raises ValueError if it holds NaN or infinities (they would poison whole blocks in silence).
        """
        if weight.ndim != 2:
            raise ValueError(f"NF4 takes matrices, not shape {tuple(weight.shape)}")
        dense = weight.detach().to(torch.float32).contiguous()
        if not bool(torch.isfinite(dense).all()):
            raise ValueError("the weight holds NaN or infinite values")
        codes, state = bnb.quantize_4bit(dense, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
        return cls(
            shape=(dense.shape[0], dense.shape[1]),
            codes=codes.reshape(-1),
            absmax=state.absmax,
            table=state.code,
            nested_absmax=state.state2.absmax,
            nested_table=state.state2.code,
            offset=state.offset,
        )

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device, *, double: bool = True) -> NF4Weight:
        """One of that shape with nothing written to it; `double`: with double quantization."""

        def some(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        numel = shape[0] * shape[1]
        blocks = -(-numel // BLOCK_SIZE)
        codes, table = some(-(-numel // 2), torch.uint8), some(16, torch.float32)
        if not double:
            return cls(shape, codes, some(blocks, torch.float32), table)
        nested = some(-(-blocks // NESTED_BLOCK_SIZE), torch.float32)
        offset = torch.empty((), dtype=torch.float32, device=device)
        return cls(shape, codes, some(blocks, torch.uint8), table, nested, some(256, torch.float32), offset)

    @property
    def numel(self) -> int:
        """Weights represented."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the weight; the two constant tables are shared by all weights."""
        own = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(t.numel() * t.element_size() for t in own if t is not None)

    def to(self, device: torch.device) -> NF4Weight:
        """The same weight on another device."""
        return replace(
            self,
            codes=self.codes.to(device),
            absmax=self.absmax.to(device),
            table=self.table.to(device),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(device),
            nested_table=None if self.nested_table is None else self.nested_table.to(device),
            offset=None if self.offset is None else self.offset.to(device),
        )

    def quant_state(self, dtype: torch.dtype) -> bnb.QuantState:
        """bitsandbytes' description of this weight; `dtype` is what it dequantizes to. Shares the tensors."""
        nested = None
        if self.nested_absmax is not None:
            nested = bnb.QuantState(
                absmax=self.nested_absmax,
                code=self.nested_table,
                blocksize=NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            )
        return bnb.QuantState(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=self.table,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset,
            state2=nested,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A fresh dense [N, K] copy, made by bitsandbytes.

        Its CPU kernel starts a new block at each row, which is wrong (in silence) where K is no multiple of 64: the
        format's blocks run over the flat weight. Such a weight is handed over flat.
        """
        state = self.quant_state(dtype)
        if self.shape[1] % BLOCK_SIZE:
            whole = self.numel % BLOCK_SIZE == 0
            state.shape = torch.Size((self.numel // BLOCK_SIZE, BLOCK_SIZE) if whole else (self.numel,))
        return bnb.dequantize_4bit(self.codes.view(-1, 1), state).view(self.shape)

    def to_checkpoint(self, name: str) -> dict[str, Tensor]:
        """The safetensors entries bitsandbytes writes for the parameter `name` (Linear4bit's state dict)."""
        packed = self.quant_state(torch.bfloat16).as_dict(packed=True)
        return {name: self.codes.view(-1, 1), **{f"{name}.{key}": value for key, value in packed.items()}}

    @classmethod
    def from_checkpoint(cls, codes: Tensor, entries: dict[str, Tensor]) -> NF4Weight:
        """Inverse of `to_checkpoint`; `entries` has the suffixes after "NAME." as keys.

        Raises ValueError for other formats than NF4 with blocks of 64.
        """
        fields: dict[str, Any] = dict(entries)
        if STATE_KEY not in fields:
            raise ValueError("not an NF4 weight: " + ", ".join(sorted(fields)))
        state = bnb.QuantState.from_dict(fields, device=codes.device)
        if state.blocksize != BLOCK_SIZE or (state.nested and state.state2.blocksize != NESTED_BLOCK_SIZE):
            raise ValueError(f"blocks of {state.blocksize} values; loramux reads blocks of {BLOCK_SIZE}")
        if state.shape is None or len(state.shape) != 2 or codes.dtype != torch.uint8:
            raise ValueError("the quantization state names no matrix of bytes")
        shape = (int(state.shape[0]), int(state.shape[1]))
        blocks = -(-shape[0] * shape[1] // BLOCK_SIZE)
        if codes.numel() != -(-shape[0] * shape[1] // 2) or state.absmax.numel() != blocks:
            raise ValueError(f"{codes.numel()} bytes and {state.absmax.numel()} blocks for shape {shape}")
        return cls(
            shape=shape,
            codes=codes.reshape(-1),
            absmax=state.absmax,
            table=state.code,
            nested_absmax=state.state2.absmax if state.nested else None,
            nested_table=state.state2.code if state.nested else None,
            offset=state.offset if state.nested else None,
        )

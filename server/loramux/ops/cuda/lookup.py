"""NF4 indices to values inside a kernel: byte permutations in registers, no memory, no arithmetic.

`prmt` picks four bytes out of eight by the four low nibbles of a selector, three bits each. So the 16 values of two
bytes are four such tables: for the high and the low byte of a value, the values 0 to 7 and 8 to 15. A third `prmt`
takes each byte from the one or the other, by bit 3 of the index. Four indices cost eight `prmt` and a share of the six
operations that prepare the selectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# bitsandbytes' table of NF4 values (Dettmers et al. 2023, appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def lookup_assembly(dtype: torch.dtype) -> str:
    """PTX that turns a word of four bytes, $4, into four values of their high nibbles, $0 and $1, and four of their
    low ones, $2 and $3. Elementwise: value i belongs to byte i, whatever bytes the compiler puts into a word."""
    bits = torch.tensor(NF4_VALUES).to(dtype).view(torch.int16).tolist()
    high, low = [value >> 8 & 255 for value in bits], [value & 255 for value in bits]
    tables = [_words(high[:8]), _words(high[8:]), _words(low[:8]), _words(low[8:])]
    lines = [
        "{",
        ".reg .b32 index, side, a, b, high, low;",
        "and.b32 index, $4, 0x77777777;",
        "shr.u32 side, $4, 1;",
        "and.b32 side, side, 0x44444444;",
        "or.b32 side, side, 0x32103210;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 index, index, 16;", "shr.u32 side, side, 16;"]
        for name, (first, second) in (("high", tables[:2]), ("low", tables[2:])):
            lines += [
                f"prmt.b32 a, {first[0]}, {first[1]}, index;",
                f"prmt.b32 b, {second[0]}, {second[1]}, index;",
                f"prmt.b32 {name}, a, b, side;",
            ]
        # The permuted bytes stand in the order of the nibbles: low, high, low, high.
        lines += [f"prmt.b32 ${half}, low, high, 0x7351;", f"prmt.b32 ${2 + half}, low, high, 0x6240;"]
    return "\n".join([*lines, "}"])


def _words(table: list[int]) -> tuple[str, str]:
    """Eight bytes as two words, little-endian."""
    first, second = (int.from_bytes(bytes(table[at : at + 4]), "little") for at in (0, 4))
    return f"{first:#010x}", f"{second:#010x}"


def is_standard(values: Tensor) -> bool:
    """Whether a weight's own table is the one that is compiled in."""
    return bool(torch.equal(values.cpu(), torch.tensor(NF4_VALUES)))


@triton.jit
def nf4_values(codes, values, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """codes uint8 [...] → values of the high and of the low nibbles, both DTYPE [...].

    `values` is the table in memory, float32 [16], for the interpreter, where ASSEMBLY is empty.
    """
    if ASSEMBLY == "":
        high = tl.load(values + (codes >> 4).to(tl.int32)).to(DTYPE)
        low = tl.load(values + (codes & 15).to(tl.int32)).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        high, low = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        high, low = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return high, low

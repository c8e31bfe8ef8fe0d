"""Compiles the small kernels for real GPUs, without one: `python -m tests.ops.compile_small_kernels 80 90`.

Prints a line of JSON for each kernel. Not for a process whose triton interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from loramux.ops.cuda import dense, elementwise, sampling
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def norm(width: int) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    block = triton.next_power_of_2(width)
    types = {"x": "*bf16", "x_row": "i32", "residual": "*bf16", "residual_row": "i32", "weight": "*bf16"}
    types |= {"total": "*bf16", "y": "*bf16", "width": "i32", "epsilon": "fp32"}
    return elementwise._norm, types, {"HAS_RESIDUAL": True, "BLOCK": block}, elementwise.norm_warps(block)


def gate() -> tuple[Any, dict[str, str], dict[str, Any], int]:
    types = {"both": "*bf16", "both_row": "i32", "y": "*bf16", "width": "i32"}
    return elementwise._gate, types, {"BLOCK": elementwise._GATE_COLUMNS}, 4


def rotate(dim: int) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    types: dict[str, str] = {}
    for name in "qkv":
        types |= {name: "*bf16", f"{name}_row": "i32", f"{name}_head": "i32"}
    types |= dict.fromkeys(("cosines", "sines", "rotated"), "*bf16")
    for name in ("key", "value"):
        types |= {f"{name}s": "*bf16", f"{name}_block": "i32", f"{name}_head": "i32", f"{name}_at": "i32"}
    types |= {"slots": "*i64"}
    types |= dict.fromkeys(("heads", "kv_heads", "dim", "value_dim", "block_size"), "i32")
    constants = {"ROTARY": True, "HEADS": elementwise._HEADS, "HALF": dim // 2, "DIM": dim, "VALUE_DIM": dim}
    return elementwise._rotate_and_store, types, constants, 4


def head(inputs: int) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    types = dict.fromkeys(("x", "weight", "bias", "y"), "*bf16") | dict.fromkeys(("rows", "width", "row_tiles"), "i32")
    constants = {"K": inputs, "BIAS": True, "BLOCK_T": dense._ROWS, "BLOCK_N": dense._OUTPUTS}
    return dense._dense, types, constants | {"BLOCK_K": dense._INPUTS, "WIDE": False}, 4


def look() -> tuple[Any, dict[str, str], dict[str, Any], int]:
    types = {"logits": "*bf16", "logits_row": "i32", "vocabulary": "i32", "highest": "*fp32", "mass": "*fp32"}
    types |= {"place": "*i32", "broken": "*i32", "chunks": "i32"}
    return sampling._look, types, {"CHUNK": sampling.CHUNK}, 8


def conclude() -> tuple[Any, dict[str, str], dict[str, Any], int]:
    types = {"highest": "*fp32", "mass": "*fp32", "place": "*i32", "broken": "*i32", "chunks": "i32"}
    types |= {"ids": "*i64", "finite": "*i1", "logprob": "*fp32"}
    return sampling._conclude, types, {"CHUNKS": 64}, 1


KERNELS = {
    "norm 4096": norm(4096),
    "norm 16384": norm(16384),
    "gate": gate(),
    "rotate 64": rotate(64),
    "rotate 256": rotate(256),
    "head": head(4096),
    "look": look(),
    "conclude": conclude(),
}


def compile_kernel(name: str, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one kernel."""
    kernel, types, constants, warps = KERNELS[name]
    signature = types | dict.fromkeys(constants, "constexpr")
    # As a launch specializes what torch gives: addresses and most strides are multiples of 16.
    aligned = [["tt.divisibility", 16]]
    numbers = ("_row", "_block", "width", "dim", "value_dim")
    attributes = {
        (i,): aligned
        for i, (key, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and key.endswith(numbers))
    }
    source = ASTSource(kernel, signature, {(list(signature).index(k),): v for k, v in constants.items()}, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(done.asm["ptx"])
        architecture = re.search(r"\.target (sm_\w+)", done.asm["ptx"])
        assert architecture is not None
        command = [PTXAS, "-v", f"-arch={architecture[1]}", file, "-o", Path(folder) / "kernel.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    assert registers is not None
    assert spilled is not None
    return {
        "kernel": name,
        "sm": capability,
        "registers": int(registers[1]),
        "spilled": int(spilled[1]),
        "shared": done.metadata.shared,
    }


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for name in KERNELS:
            print(json.dumps(compile_kernel(name, capability)), flush=True)

"""The parts of the GPU check: small, in order of value, each for a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Part(NamedTuple):
    """A function of this package (module:function) for a table of the document, and the most seconds it may take.

    With `files`, patterns of tests: the function is called for each file, in a process of its own.
    """

    table: str
    function: str
    seconds: float
    files: tuple[str, ...] = ()


PARTS = {
    "machine": Part("machine", "machine:machine", 40),
    "compile": Part("compile", "machine:compile_kernels", 60),
    "smoke": Part("smoke", "pytests:run_file", 40, ("tests/gpu/test_smoke_*.py",)),
    "steps": Part("steps", "steps:steps", 70),
    "profile": Part("profile", "steps:profile", 45),
    "gemm": Part("gemm", "machine:gemm", 30),
    "tests": Part("tests", "pytests:run_file", 60, ("tests/gpu/test_[!s]*.py", "tests/ops/test_triton_*.py")),
    "all-steps": Part("steps", "steps:all_steps", 90),
    "peers": Part("steps", "peers:peers", 60),
    "served": Part("served", "served:served", 100),
    "sanitizer": Part("sanitizer", "pytests:sanitize", 100),
}
FIRST = ("machine", "compile", "smoke", "steps", "profile", "gemm", "tests")
SECOND = ("machine", "smoke", "all-steps", "peers", "served", "sanitizer")


def processes(name: str) -> Iterator[list[str]]:
    """The arguments for `loadtest gpu-part` of each process of a part."""
    if not PARTS[name].files:
        yield [name]
    for pattern in PARTS[name].files:
        yield from ([name, str(path.relative_to(ROOT))] for path in sorted(ROOT.glob(pattern)))

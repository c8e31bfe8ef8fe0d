"""What the kernels need of cards that are not here, at shapes of models that nobody loads here.

CI compiles the corners; `make gpu-compile` (tests/ops/compile_matrix.py) the rest.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from loramux.ops.cuda.linear import Operation
from loramux.ops.cuda.precompile import Compiled, Heads, Shapes, Steps, precompile, steps

# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, table 30).
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
MODELS = {
    "Llama-3.2-1B": Shapes.llama(2048, 8192, 32, 8, 64, 128_256),
    "Llama-3-8B": Shapes.llama(4096, 14_336, 32, 8, 128, 128_256),
    "Qwen3-32B": Shapes.llama(5120, 25_600, 64, 8, 128, 151_936),
    "Llama-3-70B": Shapes.llama(8192, 28_672, 64, 8, 128, 128_256),
}
# The widest input, which is in most shares, of one operation: its outputs change nothing but the grid.
WIDEST = Shapes((Operation(28_672, (8192,)),), (), 64, 0)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of kernels."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def fits(compiled: Compiled, capability: int) -> None:
    assert compiled.shared <= SHARED[capability], compiled
    # Two registers; on 8.x some more, in tiles of 128 rows that were chosen by what 9.0 does with them.
    assert compiled.spilled <= (8 if capability >= 90 else 72), compiled
    if compiled.kernel in ("nf4_linear", "lora_down"):
        copies = compiled.loads["cp.async.cg"] + compiled.loads["cp.async.ca"]
        assert copies > 0, f"nothing is loaded while something is computed: {compiled}"
    if compiled.kernel == "nf4_linear":
        assert compiled.loads["v4"] > 0, f"B is read in pieces: {compiled}"
        assert compiled.loads["b16"] > 8, f"B of a rank of 4 has rows of eight bytes: {compiled}"


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_the_corners_fit_the_card(capability: int) -> None:
    # From 9.0 on an operation's two kernels run side by side.
    widest = replace(WIDEST, overlap=capability >= 90)
    done = precompile(widest, Steps((8, 16, 32, 64, 511), (16, 256), (False,)), capability, processes=1, resources=True)
    assert len([c for c in done if c.kernel == "nf4_linear"]) == 5
    assert len([c for c in done if c.kernel == "lora_down"]) == 16  # 64 and 511 rows have one tile
    for compiled in done:
        fits(compiled, capability)


@pytest.mark.parametrize("invariant", [False, True])
def test_attention_of_wide_heads_fits_a_small_card(invariant: bool) -> None:
    """Gemma 4's global heads; two parts of such on their way were 128 KiB."""
    shapes = Shapes((), (Heads(2, 2, 512),), 64, 0, invariant=invariant)
    for compiled in precompile(shapes, Steps((8,), (0,), (False,)), 89, processes=1):
        assert compiled.shared <= SHARED[89], compiled


def test_batch_invariant_operations_are_one_kernel_each() -> None:
    """Another instruction may sum in another order: no rank of a row's company may choose one."""
    done = precompile(
        Shapes((Operation(4096, (4096,)),), (), 64, 0, invariant=True),
        Steps((1, 64, 200), (16, 32, 256), (False,)),
        90,
        processes=1,
    )
    assert sorted(c.kernel for c in done if "4096" in c.what) == ["lora_down", "nf4_linear"]


def test_numbers_that_move_compile_nothing_again() -> None:
    """Rows within a tile, and the segments of a step."""
    shapes = Shapes((Operation(256, (64,)),), (), 64, 0)
    done = precompile(shapes, Steps((1, 2, 5, 7, 8), (16,), (False,)), 90, processes=1)
    assert sorted(c.kernel for c in done) == ["_norm", "_norm", "lora_down", "nf4_linear"]


def test_a_second_start_finds_all_of_it_on_disk(own_cache: Path) -> None:
    shapes = Shapes((Operation(256, (64,)),), (), 64, 0)
    first = precompile(shapes, Steps((8,), (0,), (False,)), 90, processes=1)
    written = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.cubin")}
    assert len(written) == len(first)
    assert precompile(shapes, Steps((8,), (0,), (False,)), 90, processes=1)
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.cubin")} == written


def test_a_failure_says_why() -> None:
    with pytest.raises(RuntimeError, match="no attribute 'float3'"):
        precompile(Shapes((), (), 64, 0, dtype="float3"), Steps((8,), (0,), (False,)), 90, processes=1)


def test_a_failure_may_take_many_words() -> None:
    """More than a pipe holds: a compiler that fails prints what it was given."""
    shapes = Shapes((), (), 64, 0, dtype="float3" * 50_000)
    with pytest.raises(RuntimeError, match=r"compiling kernels failed: .*float3"):
        precompile(shapes, Steps((8,), (0,), (False,)), 90, processes=1)


def test_the_steps_of_a_server_have_every_tile() -> None:
    wanted = steps(64, invariant=False)
    assert wanted.ranks == (0, 16, 32, 64)
    assert wanted.rows[0] == 8
    assert wanted.rows[-1] == 511
    assert steps(0, invariant=False).ranks == (0,)
    assert len(steps(24, invariant=True).rows) == 1


@pytest.mark.skipif(not os.environ.get("LORAMUX_COMPILE_ALL"), reason="some minutes; `make gpu-compile` runs it")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_fits_every_card(model: str, capability: int) -> None:
    processes = len(os.sched_getaffinity(0))
    shapes = replace(MODELS[model], overlap=capability >= 90)
    done = precompile(shapes, steps(256, invariant=False), capability, processes=processes, resources=True)
    for compiled in done:
        print(*compiled)
        fits(compiled, capability)

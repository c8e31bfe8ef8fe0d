"""Kernels compiled ahead, by the product's own launches, in processes of their own, into Triton's cache on disk.

A process compiles for a card that need not be there: a driver stands in that names the card alone, tensors are on the
meta device, and each launch stops where its kernel is compiled. So the same code fills the cache before a server says
that it is ready, and tells in a test what each kernel needs of a card that nobody has.

`python -m loramux.ops.cuda.precompile` is such a process: a request as JSON on standard input, a line of JSON for each
kernel on standard output.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from loramux.ops.cuda import elementwise
from loramux.ops.cuda.attention import attention
from loramux.ops.cuda.dense import DenseLinear
from loramux.ops.cuda.linear import DENSE_ROWS, MANY_SEGMENTS, Operation, TritonLinear, row_counts
from loramux.ops.cuda.sampling import greedy
from loramux.ops.cuda.segments import TritonSegments
from loramux.ops.cuda.tiles import TiledNF4
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch

META = torch.device("meta")
# In PTX.
_LOADS = {
    "cp.async.cg": r"cp\.async\.cg\.shared\.global",
    "cp.async.ca": r"cp\.async\.ca\.shared\.global",
    "v4": r"ld\.global\S*\.v4\.b32",
    "b16": r"ld\.global\S*\.b16",
}


class Heads(NamedTuple):
    """An attention: query heads, key-value heads, their dimension, and its sliding window."""

    queries: int
    keys: int
    dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the launches of a model depend on.

    vocabulary  logits of a row, for the sampler; 0: none
    overlap     whether the card can run an operation's two kernels side by side (`can_overlap`)
    """

    operations: tuple[Operation, ...]
    attentions: tuple[Heads, ...]
    hidden: int
    vocabulary: int
    dtype: str = "bfloat16"
    invariant: bool = False
    block_size: int = 16
    overlap: bool = False

    @classmethod
    def llama(cls, hidden: int, intermediate: int, heads: int, kv_heads: int, dim: int, vocabulary: int) -> Shapes:
        """A Llama-shaped model's, in NF4 with double quantization."""
        qkv = Operation(hidden, (heads * dim, kv_heads * dim, kv_heads * dim))
        o, down = Operation(heads * dim, (hidden,)), Operation(intermediate, (hidden,))
        gate_up = Operation(hidden, (intermediate, intermediate))
        return cls((qkv, o, gate_up, down), (Heads(heads, kv_heads, dim),), hidden, vocabulary)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Shapes:
        """The inverse of `dataclasses.asdict` and JSON."""
        operations = tuple(Operation(k, tuple(n), double, bias) for k, n, double, bias in values["operations"])
        return cls(**{**values, "operations": operations, "attentions": tuple(Heads(*h) for h in values["attentions"])})


class Steps(NamedTuple):
    """The steps to compile for: rows, the largest ranks of their adapters (0: without), and whether adapters may have
    lora_bias or a DoRA scale."""

    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    extras: tuple[bool, ...]


def steps(max_rank: int, *, invariant: bool) -> Steps:
    """All that a server with adapters up to `max_rank` can meet."""
    # One rank for each tile of lora_down's, and of B's.
    ranks = tuple(rank for rank in (16, 32, 64) if rank < max_rank)
    return Steps(
        row_counts(DENSE_ROWS - 1, invariant=invariant), (0, *ranks, max_rank) if max_rank else (0,), (False, True)
    )


class Compiled(NamedTuple):
    """A kernel: how long it took (about nothing if the cache had it), registers a thread, bytes that a thread spills,
    bytes of shared memory, and how often it loads: asynchronously past the first cache (sixteen bytes each) or through
    it, at once sixteen bytes, or two."""

    kernel: str
    what: str
    seconds: float
    registers: int
    spilled: int
    shared: int
    warps: int
    loads: dict[str, int]


def precompile(
    shapes: Shapes,
    wanted: Steps,
    capability: int,
    *,
    processes: int,
    resources: bool = False,
    tell: Callable[[Compiled], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Compiled]:
    """Compile what `wanted` steps of a model launch on a card of that compute capability (90), in so many processes.

    With `resources` each line has them (a look at each binary; otherwise zeros). After each kernel tell(kernel) and
    progress(done, total) are called. Raises RuntimeError with what a process last said if one fails.
    """
    request = {"shapes": asdict(shapes), "steps": wanted, "capability": capability, "resources": resources}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Nobody needs a context on the device for compiling.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", __spec__.name]
    with contextlib.ExitStack() as stack:
        running = []
        for index in range(processes):
            # No pipe, which one that fails may fill (a compiler prints all that it could not compile) while nobody
            # reads it.
            said = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    env=environment,
                )
            )
            stack.callback(process.kill)
            assert process.stdin is not None
            process.stdin.write(json.dumps({**request, "share": [index, processes]}))
            process.stdin.close()
            running.append((process, said))
        done: list[Compiled] = []
        for process, said in running:
            assert process.stdout is not None
            for line in process.stdout:
                values = json.loads(line)
                total = values.pop("of")
                done.append(Compiled(**values))
                tell(done[-1])
                progress(len(done), total)
            if process.wait() != 0:
                said.seek(0)
                words = said.read().strip()[-2000:] or f"a process ended with status {process.returncode}"
                raise RuntimeError(f"compiling kernels failed: {words}")
    return done


def compiled_before(shapes: Shapes, wanted: Steps, capability: int) -> Path:
    """A file beside Triton's cache that is there once all of this was compiled by this version of everything."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    words = sources, triton.__version__, asdict(shapes), wanted, capability
    name = hashlib.sha256(repr(words).encode()).hexdigest()[:32]
    return Path(triton.knobs.cache.dir) / f"loramux-{name}"


class Card:
    """As much of a driver as compiling asks for: a card of that compute capability (90)."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Launches:
    """The kernels that are launched, each once, in the place of `JITFunction.run`: nothing runs."""

    def __init__(self) -> None:
        self.what = ""
        self._compile: Callable[..., Any] = JITFunction.run
        self._found: dict[object, tuple[str, JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = {}

    def note(self, kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A launch."""
        key = kernel.__name__, *map(_argument, kernel.params, args), *sorted(kwargs.items())
        self._found.setdefault(key, (self.what, kernel, args, kwargs))

    def compile(self, share: int, shares: int, *, resources: bool) -> None:
        """Print a line of JSON for each of this share."""
        for what, kernel, args, kwargs in list(self._found.values())[share::shares]:
            begin = time.monotonic()
            made = self._compile(kernel, *args, grid=(1,), warmup=True, **kwargs)
            seconds = time.monotonic() - begin
            ptx = made.asm["ptx"]
            registers, spilled = needs(made.asm["cubin"]) if resources else (0, 0)
            compiled = Compiled(
                kernel.__name__,
                what,
                round(seconds, 2),
                registers,
                spilled,
                made.metadata.shared,
                made.metadata.num_warps,
                {name: len(re.findall(pattern, ptx)) for name, pattern in _LOADS.items()},
            )
            print(json.dumps({**compiled._asdict(), "of": len(self._found)}), flush=True)


def _argument(parameter: Any, value: object) -> object:
    """What of an argument a kernel is compiled for; not coarser than Triton's own key."""
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, int) and not parameter.do_not_specialize:
        return value == 1, value % 16 == 0, value >= 1 << 31
    return type(value)


def needs(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its own memory: what is spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), max(int(found[2]), int(found[3]))


def _launch_all(shapes: Shapes, wanted: Steps, launches: _Launches) -> None:
    """Everything that those steps launch."""
    dtype: torch.dtype = getattr(torch, shapes.dtype)

    def empty(*size: int) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=META)

    linears = [_linear(operation, shapes) for operation in shapes.operations]
    for rows in wanted.rows:
        for rank in wanted.ranks:
            # Of few segments and of many, of adapters without extras and with them.
            kinds = itertools.product((1, MANY_SEGMENTS), wanted.extras) if rank else [(0, False)]
            for count, extras in kinds:
                segments = TritonSegments.reserve(count, rows, rank, META, extras=extras)
                for operation, linear in zip(shapes.operations, linears, strict=True):
                    outputs = "+".join(map(str, operation.outputs))
                    launches.what = f"{outputs} of {operation.inputs}, {rows} rows, rank {rank}{' extras' * extras}"
                    linear.run(empty(rows, operation.inputs), segments)
        launches.what = f"{rows} rows"
        x = empty(rows, shapes.hidden)
        elementwise.norm(x, None, x[0], 1e-5)
        elementwise.norm(x, x, x[0], 1e-5)
        for operation in shapes.operations:
            if len(operation.outputs) == 2:
                elementwise.gate(empty(rows, sum(operation.outputs)))
    for heads in shapes.attentions:
        _attend(shapes, heads, dtype, launches)
    if shapes.vocabulary:
        launches.what = f"{shapes.vocabulary} logits"
        greedy(empty(8, shapes.vocabulary))
        head = DenseLinear(empty(shapes.vocabulary, shapes.hidden), None, invariant=shapes.invariant)
        head.run(empty(8, shapes.hidden), TritonSegments.reserve(0, 0, 0, META, extras=False))


def _attend(shapes: Shapes, heads: Heads, dtype: torch.dtype, launches: _Launches) -> None:
    """A prompt, decoding, and both in one step; of each, a rotation into the cache too."""

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=META)

    cache = LayerCache(*(empty(1, heads.keys, shapes.block_size, heads.dim) for _ in range(2)))
    shape = AttentionShape(heads.dim**-0.5, heads.window)
    widths = heads.queries * heads.dim, heads.keys * heads.dim, heads.keys * heads.dim
    # The number of sequences decides into how many parts contexts are cut.
    for starts in [(0, 64), (0, 1, 65), *(tuple(range((1 << i) + 1)) for i in range(8))]:
        launches.what = f"{heads.queries} heads over {heads.keys}, {len(starts) - 1} sequences of {starts[-1]} rows"
        rows, sequences = starts[-1], len(starts) - 1
        batch = PagedBatch(
            slots=empty(rows, dtype=torch.int64),
            query_starts=empty(sequences + 1, dtype=torch.int32),
            context_lens=empty(sequences, dtype=torch.int32),
            block_tables=empty(sequences, 512, dtype=torch.int32),
            starts=starts,
            contexts=(1024,) * sequences,
        )
        fused = empty(rows, sum(widths)).split(widths, dim=1)
        q, k, v = (part.unflatten(1, (-1, heads.dim)) for part in fused)
        turns = empty(rows, heads.dim)
        # Some models have rotated already.
        elementwise.rotate_and_store(q, k, v, None, None, cache, batch.slots)
        rotated = elementwise.rotate_and_store(q, k, v, turns, turns, cache, batch.slots)
        attention(rotated, k, v, cache, batch, shape, invariant=shapes.invariant)


def _linear(operation: Operation, shapes: Shapes) -> TritonLinear:
    """Of a shape, without weights."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=META)

    parts = len(operation.outputs)
    tiled = TiledNF4(
        k=operation.inputs,
        rows=operation.outputs,
        codes=empty(1, dtype=torch.uint8),
        absmax=empty(1, dtype=torch.uint8 if operation.double else torch.float32),
        group_scales=empty(1),
        tables=empty(parts, 256),
        offsets=empty(parts),
        values=empty(16),
    )
    biases = [empty(n) if operation.bias else None for n in operation.outputs]
    return TritonLinear(tiled, biases, range(parts), overlap=shapes.overlap, invariant=shapes.invariant)


def main(request: dict[str, Any]) -> None:
    """Compile this process's share."""
    triton.runtime.driver.set_active(Card(request["capability"]))
    launches = _Launches()

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.note(kernel, args, kwargs)

    JITFunction.run = run
    _launch_all(Shapes.from_json(request["shapes"]), Steps(*request["steps"]), launches)
    launches.compile(*request["share"], resources=request["resources"])


if __name__ == "__main__":
    main(json.load(sys.stdin))

"""What is left for keys and values on a device, and the sentences when it is too little."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loramux.config import Settings
from loramux.errors import TooLittleMemory
from loramux.model import kv_capacity
from loramux.model.graphs import MEMORY as GRAPHS
from loramux.ops.site import Site
from loramux.values import Memory
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 1 << 20


def model(device: str, **facts: Any) -> Any:
    """A model of 1 MiB of keys and values a block of 16 tokens."""
    return SimpleNamespace(
        device=torch.device(device),
        kv_bytes_per_token=MIB // 16,
        max_context=1024,
        dtype=torch.bfloat16,
        vocab_size=1000,
        sites=(Site(0, "q", 64, 64), Site(1, "gate", 64, 192)),
        can_capture=device == "cuda",
        **facts,
    )


def blocks(device: str, memory: Memory | None, adapters: int = 300 * MIB, rows: int = 1000) -> int:
    """Of 1000 MiB; a step and the graphs take 100 MiB."""
    settings = Settings(kv_memory=memory, adapter_memory=adapters, max_batch_rows=rows, max_batch_tokens=1000)
    return kv_capacity.kv_blocks(model(device), settings, 16, 1000 * MIB)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_capacity, "step_bytes", lambda model, tokens, rows, **_: 60 * MIB)
    monkeypatch.setattr(kv_capacity, "GRAPHS", 40 * MIB)


@pytest.mark.usefixtures("step")
def test_what_is_taken_later_is_left_alone_on_a_gpu() -> None:
    assert blocks("cuda", None) == int(0.85 * 600)
    assert blocks("cuda", Memory(fraction=0.5)) == 300
    assert blocks("cuda", Memory(bytes=600 * MIB)) == 600
    assert blocks("cuda", None, rows=2) == 2 * 64
    assert blocks("cpu", None) == 100, "a CPU's adapters are not taken from what is free now"
    assert blocks("cpu", Memory(bytes=900 * MIB)) == 900
    assert blocks("cpu", Memory(bytes=2000 * MIB), rows=2) == 2 * 64
    with pytest.raises(TooLittleMemory, match="2000 MiB, of which 1280 MiB could ever be used, are more than"):
        blocks("cpu", Memory(bytes=2000 * MIB), rows=20)


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize(
    ("memory", "adapters", "missing", "sentence"),
    [
        (
            Memory(fraction=0.5),
            900 * MIB,
            128 * MIB + 1,  # half of it for one request
            r"cuda: of 1000 MiB that the weights leave, adapters may take 900 MiB \(--adapter-memory\), a step 60 MiB "
            r"\(--max-batch-tokens\) and CUDA graphs 40 MiB; the KV cache of one request of 1024 tokens needs 64 MiB",
        ),
        (Memory(bytes=70 * MIB), 2000 * MIB, 1170 * MIB, "adapters may take 2000 MiB"),
        (Memory(bytes=700 * MIB), 300 * MIB, 100 * MIB, "--kv-memory: 700 MiB are more than the 600 MiB that weights"),
        (Memory(bytes=63 * MIB), MIB, MIB, "--kv-memory: 63 MiB hold 1008 tokens, less than one request of 1024"),
        (Memory(fraction=0.5), 800 * MIB, 28 * MIB + 1, "--kv-memory: 50 MiB hold 800 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_figures(memory: Memory, adapters: int, missing: int, sentence: str) -> None:
    with pytest.raises(TooLittleMemory, match=sentence) as refused:
        blocks("cuda", memory, adapters)
    assert refused.value.missing == missing


def test_the_bytes_of_a_step() -> None:
    """3 operations' inputs and outputs twice and a dense weight, in 16 bits; logits in 16 bits and thrice in 32."""
    layer = 3 * 2 * (2 * 10 * 256 + 64 * 192)
    assert kv_capacity.step_bytes(model("cuda"), 10, 4) == layer + 4 * 1000 * (2 + 12)


def test_graphs_are_reckoned_with_where_they_can_be() -> None:
    settings = Settings()
    assert kv_capacity.reserve(model("cuda"), settings).graphs == GRAPHS
    assert kv_capacity.reserve(model("cpu"), settings).graphs == 0


@pytest.mark.parametrize("tokens", [512, 8192])
def test_shares_of_sums_of_many_rows_are_planned_for(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Llama-3-8B's shapes with --batch-invariant: 2.5 GB for a step of 8192 tokens, where 2 GB were planned."""
    pytest.importorskip("triton")
    from loramux.ops.cuda import precompile
    from loramux.ops.cuda.linear import Operation
    from loramux.ops.cuda.segments import TritonSegments
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for function in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(function, "run", lambda *_, **__: None)
    llama = model("cuda")
    llama.sites = (Site(0, "gate", 14_336, 4096), Site(1, "down", 4096, 14_336))
    planned = kv_capacity.step_bytes(llama, tokens, 0, invariant=True)
    for operation in (
        Operation(4096, (4096, 1024, 1024)),
        Operation(4096, (14_336, 14_336)),
        Operation(14_336, (4096,)),
    ):
        taken: list[int] = []

        class Taken(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                made: torch.Tensor = func(*args, **(kwargs or {}))
                taken.append(made.nbytes)  # noqa: B023
                return made

        linear = precompile._linear(operation, precompile.Shapes((operation,), (), 64, 0, invariant=True))
        x = torch.empty(tokens, operation.inputs, dtype=torch.bfloat16, device="meta")
        segments = TritonSegments.reserve(1, tokens, 64, x.device, extras=False)
        with Taken():
            linear.run(x, segments)
        assert x.nbytes + sum(taken) <= planned

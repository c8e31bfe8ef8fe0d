"""A stand-in for CUDA graphs on the CPU: a tape of torch's operations and of Triton's launches on the same tensors.

What is not static shows: a replay reads and writes the tensors that were there when it was recorded, and looks at no
Python value again. What a capture does not allow (waiting for a value, making a tensor of host values) is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

_FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "pin_memory")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.muted = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.muted:
            return func(*args, **kwargs)
        if any(word in str(func) for word in _FORBIDDEN):
            raise RuntimeError(f"{func} in a capture")
        results = func(*args, **kwargs)

        def again() -> None:
            for old, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(again)
        return results


class TapeRecorder:
    """`model.graphs.Recorder`. A capture runs nothing; this one does, and puts back what `written()` gives after it.

    `cost` is what a recording takes of memory, `held` what they hold together; each of `faults` is raised in place of
    a recording, None lets one through. `last` is what was replayed last.
    """

    def __init__(self, written: Callable[[], Sequence[Tensor]] = lambda: (), cost: int = 1) -> None:
        self.written = written
        self.cost = cost
        self.faults: list[RuntimeError | None] = []
        self.recorded = self.replayed = self.launches = self.held = 0
        self.last: Callable[[], None] | None = None

    def held_bytes(self) -> int:
        return self.held

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        kept = [(tensor, tensor.clone()) for tensor in self.written()]
        recording = _Recording()
        run = interpreter.GridExecutor.__call__

        def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            recording.muted = True
            try:
                run(executor, *args, **kwargs)
            finally:
                recording.muted = False
            recording.calls.append(lambda: run(executor, *args, **kwargs))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter.GridExecutor, "__call__", note)
            with recording:
                launch()
        for tensor, content in kept:
            tensor.copy_(content)
        self.recorded += 1
        self.held += self.cost

        def replay() -> None:
            self.replayed += 1
            self.last = replay
            with torch.inference_mode():
                for call in recording.calls:
                    call()

        return replay

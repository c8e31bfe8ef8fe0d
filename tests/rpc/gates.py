"""Threads that wait until a test lets them go on, so that a request can be caught in every phase without sleeping."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from loramux.lora.folder import AdapterFolder
from loramux.model.inputs import ModelInputs
from torch import Tensor

from tests.engine.fakes import FakeModel
from tests.rpc.stack import ByteTokens, read_adapter

_FORGOTTEN = 60.0  # seconds


class Gate:
    """Open, or closed with some permits; who comes while it is closed takes one or waits."""

    def __init__(self) -> None:
        self.waiting = self.passed = 0
        self._open = True
        self._permits = 0
        self._condition = threading.Condition()

    def close(self) -> None:
        with self._condition:
            self._open = False

    def open(self) -> None:
        with self._condition:
            self._open = True
            self._permits = 0
            self._condition.notify_all()

    def let_one_pass(self) -> None:
        with self._condition:
            self._permits += 1
            self._condition.notify()

    def go_through(self) -> None:
        with self._condition:
            self.waiting += 1
            passed = self._condition.wait_for(lambda: self._open or self._permits, timeout=_FORGOTTEN)
            self.waiting -= 1
            self.passed += 1
            assert passed, "a test forgot to open the gate"
            if not self._open:
                self._permits -= 1


@dataclass(eq=False)
class GatedModel(FakeModel):
    """A step takes until it is let through `gate`; the engine sees aborts between two steps only."""

    gate: Gate = field(default_factory=Gate)

    def forward(self, inputs: ModelInputs) -> Tensor:
        self.gate.go_through()
        return super().forward(inputs)


class GatedReader:
    """Reads adapters as `read_adapter` does, through `gate`."""

    def __init__(self) -> None:
        self.gate = Gate()

    def __call__(self, folder: AdapterFolder) -> Any:
        self.gate.go_through()
        return read_adapter(folder)


class GatedTokens(ByteTokens):
    """Tokenizes through `gate`."""

    def __init__(self) -> None:
        self.gate = Gate()

    def encode(self, text: str, *how: Any) -> list[int]:
        self.gate.go_through()
        return super().encode(text)

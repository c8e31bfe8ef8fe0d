"""The way to a CUDA device, on a CPU: what is asked of the device, and in what order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from loramux.lora import staging
from loramux.lora.staging import to_device

CUDA = torch.device("cuda", 0)


class FakeDevice:
    """Streams and events that write down what is done with them; memory of the device is the host's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        self.current = "compute"
        self.fails = False
        empty, copy, record = torch.empty, torch.Tensor.copy_, self.did.append

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking

            def record(self, stream: str) -> None:
                record(f"event on {stream}")

            def synchronize(self) -> None:
                record("wait")

        def allocate(*shape: Any, dtype: torch.dtype, device: Any = None, pin_memory: bool = False) -> torch.Tensor:
            if self.fails and device is not None:
                raise torch.OutOfMemoryError("no room")
            record(f"{'pinned' if pin_memory else f'memory of {self.current}'}")
            return empty(*shape, dtype=dtype)

        def copying(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            record(f"copy on {self.current}" if non_blocking else "stage")
            return copy(target, source)

        patch.setattr(staging, "_stream", lambda device: "side")
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "default_stream", lambda device: "compute")
        patch.setattr(torch, "empty", allocate)
        patch.setattr(torch.Tensor, "copy_", copying)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: record(f"freed after {stream}"))

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


def test_one_allocation_and_one_copy_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    host = torch.arange(1000, dtype=torch.float32)
    device = FakeDevice(monkeypatch)
    assert torch.equal(to_device(host, CUDA), host)
    assert device.did == [
        *("memory of side", "pinned", "stage", "copy on side"),
        *("event on side", "wait", "freed after compute"),
    ]


@pytest.mark.parametrize("elements", [255, 256, 257, 1000])
def test_pinned_memory_is_bounded(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    host = torch.arange(elements, dtype=torch.int16).view(torch.bfloat16)
    monkeypatch.setattr(staging, "PIECE_BYTES", 512)
    device = FakeDevice(monkeypatch)
    moved = to_device(host, CUDA)
    assert torch.equal(moved.view(torch.int16), host.view(torch.int16))
    assert device.did.count("memory of side") == device.did.count("wait") == 1
    assert device.did.count("pinned") == device.did.count("copy on side") == -(-elements // 256)
    assert device.did.index("event on side") > len(device.did) - 4, "after the last copy"


def test_a_device_without_room_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    host = torch.zeros(8)
    device = FakeDevice(monkeypatch)
    device.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        to_device(host, CUDA)
    assert (device.did, device.current) == ([], "compute")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    """Beside a stream that is busy, in memory that others have used."""
    host = torch.randn(3 * staging.PIECE_BYTES // 4 + 5)
    for _ in range(3):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy
        moved = to_device(host, torch.device("cuda"))
        assert torch.equal(moved.cpu(), host)
        del moved

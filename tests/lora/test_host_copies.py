"""Adapters that are put out of a device with memory of its own come back from their host copies, not from files."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from loramux.errors import AdapterUnavailable
from loramux.lora.entry import Lease, Residency, State
from loramux.lora.folder import AdapterFolder
from loramux.lora.manager import AdapterManager
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import AdapterRoots

from tests.lora.fakes import FakeAdapter, FakeReader
from tests.patience import PATIENCE

pytestmark = pytest.mark.timeout(2 * PATIENCE)


@dataclass(frozen=True)
class OnDevice(FakeAdapter):
    """What a load gives where the device has its own memory."""

    host: FakeAdapter | None = None

    @property
    def on_host(self) -> FakeAdapter | None:  # type: ignore[override]
        return self.host


class FakeDevice:
    """Copies adapters to itself in the thread that asks; while `gate` is clear, that takes long."""

    def __init__(self, reader: FakeReader) -> None:
        self.reader = reader
        self.keeps = True
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.placed: list[FakeAdapter] = []
        self.threads: set[str] = set()

    def read(self, folder: AdapterFolder) -> OnDevice:
        return self._copied(self.reader(folder))

    def place(self, adapter: FakeAdapter) -> OnDevice:
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.placed.append(adapter)
        return self._copied(adapter)

    def _copied(self, adapter: FakeAdapter) -> OnDevice:
        return OnDevice(adapter.nbytes, adapter.digest, host=adapter if self.keeps else None)


@pytest.fixture
def device(tmp_path: Path) -> FakeDevice:
    reader = FakeReader(tmp_path)
    reader.put("a", b"0123456789")
    reader.put("b", b"other content")
    return FakeDevice(reader)


@pytest.fixture
async def manager(device: FakeDevice) -> AsyncIterator[AdapterManager]:
    """Of a device that one of the two adapters fills."""
    manager = AdapterManager(
        AdapterRegistry(device_budget=15, host_budget=100),
        AdapterRoots([device.reader.root]),
        device.read,
        place=device.place,
        cancel_grace=0.2,
    )
    yield manager
    device.gate.set()
    await manager.close()
    manager.registry.check()
    tiers = manager.registry.tiers
    for entry in manager.registry.entries():
        manager.registry.unload(entry.name)
    assert tiers.device.used == tiers.device.reserved == tiers.host.used == 0


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def fill(manager: AdapterManager) -> None:
    """Load a, then b in its place."""
    for name in "ab":
        await manager.load(name)


def ask(manager: AdapterManager, name: str, request: str) -> Lease:
    (lease,) = manager.registry.lease((name,), request)
    return lease


async def test_what_was_put_out_comes_back_by_a_copy_in_a_worker(manager: AdapterManager, device: FakeDevice) -> None:
    await fill(manager)
    a = manager.get("a")
    assert (a.residency, a.weights, a.loaded) == (Residency.HOST, None, None), "nothing of the device's is held"
    assert isinstance(a.hosted, FakeAdapter)
    assert not isinstance(a.hosted, OnDevice)
    host, seconds = a.hosted, a.load_seconds
    lease = ask(manager, "a", "r1")
    assert lease.weights is None
    await until(lambda: lease.weights is not None)
    assert device.placed == [host]
    assert device.reader.reads == 2
    assert all(name.startswith("loramux-adapters") for name in device.threads)
    assert (a.residency, a.hosted, a.load_seconds) == (Residency.DEVICE, None, seconds)
    assert manager.get("b").residency is Residency.HOST
    manager.registry.release(lease.uid, "r1")
    again = ask(manager, "b", "r2")
    await until(lambda: again.weights is not None)
    manager.registry.release(again.uid, "r2")
    assert device.reader.reads == 2
    assert manager.get("a").hosted is host, "the copy was never given up"


async def test_a_copy_that_fails_is_told_and_the_next_one_reads(manager: AdapterManager, device: FakeDevice) -> None:
    await fill(manager)
    device.error = RuntimeError("CUDA out of memory")
    lease = ask(manager, "a", "r1")
    await until(lambda: lease.error is not None)
    assert isinstance(lease.error, AdapterUnavailable)
    a = manager.get("a")
    assert (a.state, a.residency, a.hosted) == (State.READY, Residency.DISK, None)
    manager.registry.release(lease.uid, "r1")
    await until(lambda: manager.registry.budget.reserved == 0)
    again = ask(manager, "a", "r2")
    await until(lambda: again.weights is not None)
    assert device.reader.reads == 3
    manager.registry.release(again.uid, "r2")


async def test_unloaded_while_it_is_on_its_way(manager: AdapterManager, device: FakeDevice) -> None:
    await fill(manager)
    device.gate.clear()
    lease = ask(manager, "a", "r1")
    await until(lambda: device.threads)
    manager.registry.release(lease.uid, "r1")
    assert await manager.unload("a") == (0, 0)
    device.gate.set()
    await until(lambda: manager.registry.budget.reserved == 0)
    assert [entry.name for entry in manager.list()] == ["b"]
    assert manager.registry.tiers.host.used == 13, "b was put out for it"


async def test_without_a_copy_its_files_are_read_again(manager: AdapterManager, device: FakeDevice) -> None:
    device.keeps = False
    await fill(manager)
    assert manager.get("a").residency is Residency.DISK
    lease = ask(manager, "a", "r1")
    await until(lambda: lease.weights is not None)
    assert (device.reader.reads, device.placed) == (3, [])
    manager.registry.release(lease.uid, "r1")

"""An adapters file: what it says is there, at start and whenever it changes, and nothing else is touched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from loramux.errors import InvalidAdapter, InvalidRequest, LoramuxError
from loramux.lora.entry import Residency, State
from loramux.lora.limits import ReadLimits
from loramux.lora.manager import AdapterManager
from loramux.lora.manifest import read_manifest
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import AdapterRoots
from loramux.lora.snapshot import folder_digest

from tests.lora.fakes import FakeReader
from tests.patience import PATIENCE

OTHER = f"sha256:{0:064x}"


@pytest.fixture
def reader(tmp_path: Path) -> FakeReader:
    root = tmp_path / "root"
    root.mkdir()
    reader = FakeReader(root)
    for name in ("a", "b", "c"):
        reader.put(name, f"weights of {name}".encode())
    return reader


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "adapters.yaml"


@pytest.fixture
async def manager(reader: FakeReader, file: Path) -> AsyncIterator[AdapterManager]:
    registry = AdapterRegistry(device_budget=1000)
    manager = AdapterManager(registry, AdapterRoots([reader.root]), reader, declared_in=file)
    yield manager
    await manager.close()
    registry.check()


def digest(reader: FakeReader, name: str) -> str:
    return folder_digest(reader.root / name, ReadLimits())


def write(file: Path, content: str) -> None:
    file.write_text(content)


async def test_it_is_applied_at_start_and_reads_only_what_is_pinned(
    manager: AdapterManager, reader: FakeReader, file: Path
) -> None:
    write(
        file,
        f"adapters:\n- name: kept\n  source: a\n  pin: true\n- name: b\n- name: c\n  digest: {digest(reader, 'c')}\n",
    )
    await manager.start()
    kept, b, c = (manager.get(name) for name in ("kept", "b", "c"))
    assert (kept.state, kept.pinned, kept.residency) == (State.READY, True, Residency.DEVICE)
    assert (b.state, c.state, c.digest) == (State.REGISTERED, State.REGISTERED, digest(reader, "c"))
    assert reader.reads == 1
    lease = manager.registry.lease(["c"], "r1")[0]
    async with asyncio.timeout(PATIENCE):
        while lease.weights is None:
            await asyncio.sleep(0.01)
    manager.registry.release(lease.uid, "r1")


async def test_a_digest_that_is_not_there_is_refused(manager: AdapterManager, reader: FakeReader, file: Path) -> None:
    write(file, f"adapters:\n- name: a\n  digest: {OTHER}\n- name: b\n  digest: {OTHER}\n  pin: true\n")
    with pytest.raises(InvalidAdapter, match="not sha256:0000"):
        await manager.start()
    assert manager.registry.find("b") is None
    lease = manager.registry.lease(["a"], "r1")[0]
    async with asyncio.timeout(PATIENCE):
        while lease.error is None:
            await asyncio.sleep(0.01)
    assert manager.get("a").state is State.FAILED
    manager.registry.release(lease.uid, "r1")


async def test_a_changed_file_changes_what_it_names_and_nothing_else(
    manager: AdapterManager, reader: FakeReader, file: Path
) -> None:
    write(
        file, "adapters:\n- name: x\n  source: a\n- name: gone\n  source: b\n- name: pinned\n  source: c\n  pin: true\n"
    )
    await manager.start()
    await manager.load("by-hand", "b")
    lease = manager.registry.lease(["x"], "r1")[0]
    pinned = manager.get("pinned")
    write(file, "adapters:\n- name: x\n  source: b\n- name: pinned\n  source: c\n")
    await manager.reload()
    assert manager.get("x").source == str(reader.root / "b")
    assert lease.entry.source == str(reader.root / "a")
    assert lease.entry.state is State.DRAINING
    assert manager.registry.find("gone") is None
    assert manager.get("pinned") is pinned
    assert not pinned.pinned
    assert manager.get("by-hand").state is State.READY
    manager.registry.release(lease.uid, "r1")


async def test_applying_the_same_again_does_nothing(manager: AdapterManager, reader: FakeReader, file: Path) -> None:
    write(file, "adapters:\n- name: x\n  source: a\n- name: pinned\n  source: c\n  pin: true\n")
    await manager.start()
    before = manager.list()
    reads = reader.reads
    await manager.reload()
    assert manager.list() == before
    assert reader.reads == reads


async def test_a_source_is_a_place_not_the_end_of_one(manager: AdapterManager, reader: FakeReader, file: Path) -> None:
    """`a` is not what `elsewhere/a` is, though their paths end alike."""
    (reader.root / "elsewhere").mkdir()
    reader.put("elsewhere/a", b"other weights")
    write(file, "adapters:\n- name: x\n  source: elsewhere/a\n")
    await manager.start()
    write(file, "adapters:\n- name: x\n  source: a\n")
    await manager.reload()
    assert manager.get("x").source == str(reader.root / "a")


async def test_a_file_that_is_broken_changes_nothing(
    manager: AdapterManager, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(file, "adapters:\n- name: a\n")
    await manager.start()
    write(file, "adapters: [unclosed")
    await manager.reload()
    assert manager.get("a").state is State.REGISTERED
    assert "is not YAML" in caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("adapters:\n- name: a\n  sorce: x\n", r"adapters\.0\.sorce: Extra inputs"),
        ("adapters:\n- name: a\n- name: a\n", r"adapters\.1\.name: 'a' is there twice"),
        ("adapters:\n- name: ../a\n", r"adapters\.0\.name: '\.\./a' is not an adapter name"),
        ("adapters:\n- name: a\n  digest: md5:1\n", r"adapters\.0\.digest"),
        ("adapters:\n- name: a\n  pin: 'yes'\n", r"adapters\.0\.pin"),
        ("adapters: 3\n", r"adapters: Input should be a valid list"),
        ("- a\n", r"valid dictionary"),
        ("!!python/object/apply:os.system ['true']\n", r"is not YAML"),
    ],
)
def test_what_is_wrong_is_named(file: Path, content: str, says: str) -> None:
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=says):
        read_manifest(file)


async def test_a_missing_file_is_told_at_start(manager: AdapterManager) -> None:
    with pytest.raises(LoramuxError, match="cannot be read: No such file"):
        await manager.start()


async def test_the_file_is_looked_at_again_by_itself(reader: FakeReader, file: Path) -> None:
    registry = AdapterRegistry(device_budget=1000)
    manager = AdapterManager(registry, AdapterRoots([reader.root]), reader, declared_in=file, scan_interval=0.01)
    write(file, "adapters: []\n")
    await manager.start()
    write(file, "adapters:\n- name: late\n  source: a\n")
    async with asyncio.timeout(PATIENCE):
        while registry.find("late") is None:
            await asyncio.sleep(0.01)
    await manager.close()

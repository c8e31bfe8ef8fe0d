"""An adapters file: what it says is there, at start and whenever it changes, and nothing else is touched."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from loramux.errors import InvalidRequest, StartupError
from loramux.lora import yaml_text
from loramux.lora.entry import Residency, State
from loramux.lora.limits import ReadLimits
from loramux.lora.manager import AdapterManager
from loramux.lora.manifest import read_manifest
from loramux.lora.pieces import PIECE
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


async def test_a_digest_that_is_not_there_is_refused(
    manager: AdapterManager, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(file, f"adapters:\n- name: a\n  digest: {OTHER}\n- name: b\n  digest: {OTHER}\n  pin: true\n")
    await manager.start()
    assert "adapter 'b'" in caplog.text
    assert "not sha256:0000" in caplog.text
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
        (
            "adapters:\n- name: a\n  sorce: x\n",
            r"adapters\.0\.sorce: is no key that is known; an adapter has name, source, digest and pin",
        ),
        ("adapters:\n- name: a\n- name: a\n", r"adapters\.1\.name: 'a' is there twice"),
        ("adapters:\n- name: ../a\n", r"adapters\.0\.name: '\.\./a' is not an adapter name"),
        ("adapters:\n- name: a\n  digest: md5:1\n", r"adapters\.0\.digest: must be sha256: and 64 digits of 0-9a-f"),
        ("adapters:\n- name: a\n  pin: 'yes'\n", r"adapters\.0\.pin: must be true or false, without quotes"),
        ("adapters: 3\n", r"adapters: must be a list of adapters"),
        ("- a\n", r"must be a mapping; the file has one key, adapters"),
        ("adapters: [a]\n", r"adapters\.0: must be a mapping; an adapter has name, source, digest and pin"),
        ("adapters:\n- name: [a]\n", r"adapters\.0\.name: must be text"),
        (f"adapters:\n- name: a\n  source: {'x' * 4097}\n", r"adapters\.0\.source: must be shorter"),
        ("!!python/object/apply:os.system ['true']\n", r"is not YAML"),
        ("adapters:\n- name: 2020-99-99\n", r"adapters\.0\.name: '2020-99-99' is a date in YAML; write it in quotes"),
        ("adapters:\n- name: on\n", r"'on' is true or false in YAML"),
        ("adapters:\n- name: 0x1f\n", r"'0x1f' is a number in YAML"),
        ("adapters:\n- name: a\n  source: 12:30:00\n", r"adapters\.0\.source: '12:30:00' is a number"),
        ("a: 2001-12-14t21:59:43.10-99:99\n", r"a: is no key that is known; the file has one key, adapters"),
        ('adapters: !!binary "a"\n', r"line 1: the tag tag:yaml\.org,2002:binary"),
        ("adapters: " + "[" * 20_000, r"line 1: nested deeper than"),
        ("adapters: " + "{a: " * 20_000, r"line 1: nested deeper than"),
        ("- " * 20_000, r"line 1: nested deeper than"),
        ("a: &a [x]\nb: &b [*a, *a]\nadapters: *b\n", r"line 2: the alias \*a"),
        ("adapters:\n- name: a\n  name: b\n", r"line 3: the key 'name' is there twice"),
        ("adapters: []\nadapters: []\n", r"line 2: the key 'adapters' is there twice"),
        ("adapters: []\n---\nadapters: []\n", r"line 2: a second document"),
        ("? [a]\n: b\n", r"line 1: a key that is not text"),
        ('"\\e[31m": a\n', r": \\x1b\[31m: is no key"),
        ("adapters:\n" + "- {}\n" * 1000, r"adapters\.7\.name: is missing; and 992 more"),
        ("x" * 1000 + ": a\n", r"x{64}…: is no key"),
        ("\0", r"is not YAML"),
    ],
)
def test_what_is_wrong_is_named(file: Path, content: str, says: str) -> None:
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=says):
        read_manifest(file)


async def test_a_missing_file_is_told_at_start(manager: AdapterManager, file: Path) -> None:
    with pytest.raises(StartupError, match=f"^--adapters-file: {file}: cannot be read: No such file"):
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


def test_text_that_other_readers_take_for_more(file: Path) -> None:
    """In quotes all is text; and so is what looks like a type and is none."""
    file.write_text(
        "adapters:\n- name: '2020-01-01'\n- {name: \"on\", pin: yes}\n- name: 1e3\n  source: ~\n- name: 0x\n"
    )
    assert [(d.name, d.source, d.pin) for d in read_manifest(file).values()] == [
        ("2020-01-01", "", False),
        ("on", "", True),
        ("1e3", "", False),
        ("0x", "", False),
    ]


@pytest.mark.parametrize("content", ["", "adapters:\n", "adapters: []\n", "# nothing\n", "---\n"])
def test_a_file_may_declare_nothing(file: Path, content: str) -> None:
    file.write_text(content)
    assert read_manifest(file) == {}


def test_what_is_no_file_holds_nobody_up(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(InvalidRequest, match="not a regular file"):
        read_manifest(file)
    with pytest.raises(InvalidRequest, match="cannot be read: Is a directory"):
        read_manifest(file.parent)


def test_a_file_that_is_too_large_is_not_parsed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.touch()
    os.truncate(file, (16 << 20) + 1)
    monkeypatch.setattr(yaml, "parse", None)
    with pytest.raises(InvalidRequest, match="cannot be read: it has more than 16777216 bytes"):
        read_manifest(file)


def test_values_are_counted_while_they_are_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_text, "_MOST_NODES", 100)
    file.write_text("adapters: [" + "[]," * 200 + "]")
    with pytest.raises(InvalidRequest, match="more than 100 values"):
        read_manifest(file)


async def test_a_file_that_cannot_be_read_is_told_once_and_the_next_is_applied(
    reader: FakeReader, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`name: 2020-99-99` ended the watch: a ValueError out of the YAML reader, and no line of it."""
    write(file, "adapters:\n- name: a\n")
    manager = AdapterManager(AdapterRegistry(), AdapterRoots([reader.root]), reader, declared_in=file)
    await manager.start()
    declaration = manager._declaration
    assert declaration is not None
    for content in ("adapters:\n- name: a\n- name: 2020-99-99\n", "adapters: [" * 5000, "\udc80"):
        caplog.clear()
        await asyncio.to_thread(file.write_bytes, content.encode("utf-8", "surrogateescape"))
        for _ in range(4):
            await declaration.look()
        assert [r.levelname for r in caplog.records].count("ERROR") == 1, caplog.text
        assert manager.get("a").state is State.REGISTERED
    write(file, "adapters:\n- name: b\n")
    for _ in range(2):
        await declaration.look()
    assert [e.name for e in manager.list()] == ["b"]
    await manager.close()


async def test_the_watch_survives_whatever_a_look_raises(
    reader: FakeReader, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = AdapterRegistry()
    manager = AdapterManager(registry, AdapterRoots([reader.root]), reader, declared_in=file, scan_interval=0.005)
    write(file, "adapters: []\n")
    await manager.start()
    fails = 0

    def failing(path: Path) -> None:
        nonlocal fails
        fails += 1
        raise [MemoryError("no memory"), KeyError("x"), RecursionError("deep")][min(fails, 3) - 1]

    with monkeypatch.context() as patch:
        patch.setattr("loramux.lora.declaration.read_manifest", failing)
        write(file, "adapters:\n- name: late\n  source: a\n")
        async with asyncio.timeout(PATIENCE):
            while not fails:
                await asyncio.sleep(0.01)
    write(file, "adapters:\n- name: later\n  source: a\n")
    async with asyncio.timeout(PATIENCE):
        while registry.find("later") is None:
            await asyncio.sleep(0.01)
    assert caplog.text.count("no memory") >= 1
    await manager.close()


async def test_a_changed_file_is_applied_once_it_is_still(
    manager: AdapterManager, reader: FakeReader, file: Path
) -> None:
    """Half a file reads well, and would unload what the other half names."""
    whole = "adapters:\n- name: a\n- name: b\n- name: c\n"
    write(file, whole)
    await manager.start()
    declaration = manager._declaration
    assert declaration is not None
    entries = manager.list()
    for end in (20, 30, len(whole)):
        write(file, whole[:end])
        await declaration.look()
        assert manager.list() == entries
    for _ in range(2):
        await declaration.look()
    assert manager.list() == entries
    write(file, whole[:20])
    for _ in range(2):
        await declaration.look()
    assert [e.name for e in manager.list()] == ["a"]


async def test_what_is_not_there_yet_is_tried_again(
    manager: AdapterManager, reader: FakeReader, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(file, "adapters: []\n")
    await manager.start()
    declaration = manager._declaration
    assert declaration is not None
    write(file, "adapters:\n- name: late\n- name: a\n")
    for _ in range(12):
        await declaration.look()
    assert [e.name for e in manager.list()] == ["a"]
    assert caplog.text.count("there is no folder 'late'") == 1
    reader.put("late", b"weights")
    for _ in range(16):
        await declaration.look()
    assert manager.get("late").state is State.REGISTERED


@pytest.mark.parametrize("pin", [False, True])
async def test_what_is_not_there_at_start_keeps_nothing_from_serving(
    reader: FakeReader, file: Path, pin: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended the start, once the whole model was loaded, with a sentence that named no file."""
    manager = AdapterManager(AdapterRegistry(), AdapterRoots([reader.root]), reader, declared_in=file)
    write(file, f"adapters:\n- name: late\n  pin: {str(pin).lower()}\n- name: a\n")
    await manager.start()
    assert [e.name for e in manager.list()] == ["a"]
    assert caplog.text.count(f"{file}: adapter 'late': source: there is no folder 'late'") == 1
    reader.put("late", b"weights")
    declaration = manager._declaration
    assert declaration is not None
    await declaration.look()
    assert manager.get("late").state is (State.READY if pin else State.REGISTERED)
    await manager.close()


async def test_what_was_there_and_cannot_be_replaced_goes_with_its_line(
    manager: AdapterManager, reader: FakeReader, file: Path
) -> None:
    write(file, "adapters:\n- name: x\n  source: a\n")
    await manager.start()
    write(file, "adapters:\n- name: x\n  source: nowhere\n")
    await manager.reload()
    assert manager.get("x").source == str(reader.root / "a")
    write(file, "adapters: []\n")
    await manager.reload()
    assert manager.list() == []


@pytest.mark.parametrize("pin", [False, True])
async def test_without_a_digest_its_versions_all_count(reader: FakeReader, file: Path, pin: bool) -> None:
    """Whatever lies there; with one, nothing else will do."""
    registry = AdapterRegistry(device_budget=1000)
    manager = AdapterManager(registry, AdapterRoots([reader.root]), reader, declared_in=file, scan_interval=1e6)
    switch = str(pin).lower()
    write(
        file,
        f"adapters:\n- {{name: x, source: deep/a, pin: {switch}}}\n"
        f"- {{name: b, pin: {switch}, digest: '{digest(reader, 'b')}'}}\n",
    )
    (reader.root / "deep").mkdir()
    reader.put("deep/a", b"version 1")
    await manager.start()
    assert manager._catalog is not None
    before = {}
    for name in ("x", "b"):
        lease = registry.lease([name], "r")[0]
        while lease.weights is None:
            await asyncio.sleep(0.001)
        before[name] = lease.digest
        registry.release(lease.uid, "r")
    await manager._catalog.look()
    for name in ("deep/a", "b"):
        reader.put(name, b"version 2")
    for _ in range(4):
        await manager._catalog.look()
        if manager._catalog._taking is not None:
            await manager._catalog._taking
    assert manager.get("x").digest == digest(reader, "deep/a") != before["x"]
    assert manager.get("x").pinned is pin
    assert manager.get("b").digest == before["b"]
    write(file, "adapters: []\n")
    await manager.reload()
    await manager._catalog.look()
    assert registry.find("x") is None
    await manager.close()


async def test_thousands_are_applied_in_pieces(manager: AdapterManager, reader: FakeReader, file: Path) -> None:
    """60,000 lines were 60,000 tasks that began in one turn of the event loop."""
    most = 0

    async def others() -> None:
        nonlocal most
        while True:
            before = len(manager.registry._entries)
            await asyncio.sleep(0)
            most = max(most, len(manager.registry._entries) - before)

    beside = asyncio.create_task(others())
    names = [f"n{i}" for i in range(2000)]
    write(file, "adapters:\n" + "".join(f"- {{name: {name}, source: a}}\n" for name in names))
    await manager.start()
    assert len(manager.list()) == 2000
    write(file, "adapters: []\n")
    await manager.reload()
    assert manager.list() == []
    beside.cancel()
    assert 0 < most <= PIECE

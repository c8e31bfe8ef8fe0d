"""Folders under the roots: what comes, changes and goes, what serves meanwhile, and what is told."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from loramux.errors import AdapterNotFound, AdapterUnavailable, InvalidAdapter, LoramuxError
from loramux.lora.catalog import Catalog
from loramux.lora.entry import AdapterEntry, Lease, State
from loramux.lora.folder import AdapterFolder
from loramux.lora.manager import AdapterManager
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE, AdapterRoots

from tests.lora.fakes import FakeAdapter, FakeReader

pytestmark = pytest.mark.timeout(300)
STILL = 3  # looks from a change until it is taken over: one that sees it, two that find it as it was


class Reader(FakeReader):
    """Content that begins with b"bad" does not load."""

    def __call__(self, folder: AdapterFolder) -> FakeAdapter:
        if (folder.path / WEIGHTS_FILE).read_bytes().startswith(b"bad"):
            self.reads += 1
            raise InvalidAdapter("lora_A", "holds NaN")
        return super().__call__(folder)


class Bench:
    """A manager that looks when the test says so, and requests."""

    def __init__(self, root: Path, *, device: int = 100, host: int = 0) -> None:
        self.root = root
        self.reader = Reader(root)
        self.registry = AdapterRegistry(device_budget=device, host_budget=host)
        self.manager = AdapterManager(
            self.registry, AdapterRoots([root]), self.reader, scan_interval=1e6, load_timeout=20
        )
        self._requests = 0

    @property
    def catalog(self) -> Catalog:
        assert self.manager._catalog is not None
        return self.manager._catalog

    async def look(self, times: int = 1) -> None:
        for _ in range(times):
            await self.catalog.look()
            if self.catalog._taking is not None:
                await self.catalog._taking
            self.registry.check()

    async def ask(self, name: str) -> str:
        """The digest that answers; raises what the request would end with."""
        self._requests += 1
        request = f"r{self._requests}"
        lease = self.registry.lease([name], request)[0]
        try:
            await until(lambda: lease.weights is not None or lease.error is not None)
            if lease.error is not None:
                raise lease.error
            return lease.digest
        finally:
            self.registry.release(lease.uid, request)

    def hold(self, name: str) -> Lease:
        self._requests += 1
        return self.registry.lease([name], f"r{self._requests}")[0]


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    root = tmp_path / "root"
    root.mkdir()
    bench = Bench(root)
    bench.reader.put("a", b"version 1")
    yield bench
    await bench.manager.close()
    bench.registry.check()
    assert bench.registry.budget.reserved == 0


def put(bench: Bench, name: str, content: bytes, config: str = "{}") -> None:
    """Another version, renamed into place file by file."""
    for file, data in ((CONFIG_FILE, config.encode()), (WEIGHTS_FILE, content)):
        part = bench.root / name / ".part"
        part.write_bytes(data)
        part.replace(bench.root / name / file)


# A changed folder.


async def test_the_old_version_serves_until_the_folder_has_been_still(bench: Bench) -> None:
    """rsync and scp copy one file after the other; "new config, old weights" was served in between."""
    await bench.manager.start()
    old = await bench.ask("a")
    (bench.root / "a" / CONFIG_FILE).write_text('{"r": 8}')
    for _ in range(2):
        await bench.look()
        assert await bench.ask("a") == old
    (bench.root / "a" / WEIGHTS_FILE).write_bytes(b"version 2")
    for _ in range(STILL - 1):
        await bench.look()
        assert await bench.ask("a") == old
    reads = bench.reader.reads
    await bench.look()
    assert bench.reader.reads == reads + 1, "loaded before it takes over"
    new = await bench.ask("a")
    assert new != old
    assert bench.registry.get("a").managed
    await bench.look(5)
    assert await bench.ask("a") == new
    assert bench.reader.reads == reads + 1


async def test_a_copy_that_runs_beside_the_files_is_no_stillness(bench: Bench) -> None:
    """rsync writes to a file of another name first, for as long as the weights take."""
    await bench.manager.start()
    old = await bench.ask("a")
    (bench.root / "a" / CONFIG_FILE).write_text('{"r": 8}')
    part = bench.root / "a" / ".adapter_model.safetensors.Xy12Zw"
    for size in range(8):
        part.write_bytes(b"x" * size)
        await bench.look()
        assert await bench.ask("a") == old
    part.replace(bench.root / "a" / WEIGHTS_FILE)
    await bench.look(STILL)
    assert await bench.ask("a") != old


async def test_a_folder_that_changes_into_one_that_does_not_load(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.manager.start()
    old = await bench.ask("a")
    entry = bench.registry.get("a")
    put(bench, "a", b"bad version")
    await bench.look(8)
    assert bench.registry.get("a") is entry
    assert await bench.ask("a") == old
    assert caplog.text.count("holds NaN") == 1, caplog.text
    assert "goes on serving" in entry.warnings[0]
    assert "holds NaN" in entry.warnings[0]
    put(bench, "a", b"bad again, and longer")
    await bench.look(STILL)
    assert len(entry.warnings) == 1
    put(bench, "a", b"version 3")
    await bench.look(STILL)
    assert await bench.ask("a") != old
    assert bench.registry.get("a").warnings == ()


async def test_old_bytes_put_back_end_the_warning(bench: Bench) -> None:
    await bench.manager.start()
    await bench.ask("a")
    entry = bench.registry.get("a")
    put(bench, "a", b"bad version")
    await bench.look(STILL)
    assert entry.warnings
    put(bench, "a", b"version 1")
    await bench.look(STILL)
    assert bench.registry.get("a") is entry
    assert entry.warnings == ()
    assert not entry.irreplaceable


@pytest.mark.parametrize("resident", [True, False])
async def test_a_touched_folder_is_the_same_version(bench: Bench, resident: bool) -> None:
    await bench.manager.start()
    await bench.ask("a")
    entry = bench.registry.get("a")
    if not resident:
        bench.reader.put("b", b"x" * 95)
        await bench.look()
        await bench.ask("b")
    reads = bench.reader.reads
    put(bench, "a", b"version 1")
    os.utime(bench.root / "a" / CONFIG_FILE, (1, 1))
    await bench.look(STILL + 1)
    assert bench.registry.get("a") is entry
    assert bench.reader.reads == reads
    await bench.ask("a")


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
async def test_another_chat_template_is_another_version(bench: Bench, file: str, resident: bool) -> None:
    """It is not in the digest: the one that was read first was used, and told of, for ever."""
    await bench.manager.start()
    await bench.ask("a")
    entry = bench.registry.get("a")
    if not resident:
        bench.reader.put("b", b"x" * 95)
        await bench.look()
        await bench.ask("b")
    (bench.root / "a" / file).write_text('{"chat_template": "{{ messages }}"}')
    await bench.look(STILL + 1)
    changed = bench.registry.get("a")
    assert changed is not entry
    await bench.ask("a")
    (bench.root / "a" / file).touch()
    await bench.look(STILL + 1)
    assert bench.registry.get("a") is changed
    assert (await bench.manager.load("a", replace=True))[1]


async def test_requests_keep_what_they_have(bench: Bench) -> None:
    await bench.manager.start()
    await bench.ask("a")
    lease = bench.hold("a")
    put(bench, "a", b"version 2")
    await bench.look(STILL)
    assert lease.entry.state is State.DRAINING
    assert lease.weights is not None
    bench.registry.release(lease.uid, lease.request_id)
    assert lease.entry.state is State.UNLOADED


async def test_nothing_read_in_between_is_served_as_the_old_version(bench: Bench) -> None:
    """What was put out of memory cannot come back when its files have changed."""
    bench.reader.put("b", b"x" * 95)
    await bench.manager.start()
    old = await bench.ask("a")
    (bench.root / "a" / CONFIG_FILE).write_text('{"r": 8}')
    await bench.ask("b")  # puts a out, and no look has seen the change
    with pytest.raises(AdapterUnavailable, match="not in memory any more"):
        await bench.ask("a")
    (bench.root / "a" / WEIGHTS_FILE).write_bytes(b"version 2")
    waiting = None
    for _ in range(STILL + 2):
        await bench.look()
        if waiting is None and bench.registry.get("a").state is State.REGISTERED:
            waiting = asyncio.create_task(bench.ask("a"))  # it waits until the folder is still
            await asyncio.sleep(0)
    assert waiting is not None
    new = await waiting
    assert new != old
    bench.reader.put("c", b"version 2")
    shutil.copy(bench.root / "a" / CONFIG_FILE, bench.root / "c" / CONFIG_FILE)
    await bench.look()
    assert await bench.ask("c") == new, "whole, and no mixture"


async def test_what_could_not_be_read_again_is_put_out_last(tmp_path: Path) -> None:
    bench = Bench(tmp_path, device=100, host=45)
    for name, content in (("a", b"a" * 40), ("b", b"b" * 40), ("c", b"c" * 40), ("d", b"d" * 40)):
        bench.reader.put(name, content)
    await bench.manager.start()
    old = await bench.ask("a")
    for _ in range(5):
        await bench.ask("b")
    put(bench, "a", b"bad version")
    await bench.look(STILL)
    for name in ("c", "d", "b", "c", "d"):  # worth more than a, all of them
        for _ in range(5):
            await bench.ask(name)
    assert await bench.ask("a") == old
    await bench.manager.close()


async def test_a_first_read_waits_until_the_folder_is_still(bench: Bench) -> None:
    """Nothing of it is in memory that could serve; half a copy may load."""
    await bench.manager.start()
    (bench.root / "a" / CONFIG_FILE).write_text('{"r": 8}')
    asked = asyncio.create_task(bench.ask("a"))
    await bench.look()
    (bench.root / "a" / WEIGHTS_FILE).write_bytes(b"version 2")
    await bench.look(STILL - 1)
    assert not asked.done()
    assert bench.reader.reads == 0
    await bench.look()
    bench.reader.put("whole", b"version 2")
    (bench.root / "whole" / CONFIG_FILE).write_text('{"r": 8}')
    await bench.look()
    assert await asked == await bench.ask("whole")


async def test_one_that_failed_is_read_again_when_it_changes(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.reader.put("b", b"bad")
    await bench.manager.start()
    with pytest.raises(AdapterUnavailable, match="holds NaN"):
        await bench.ask("b")
    assert bench.registry.get("b").state is State.FAILED
    assert caplog.text.count("'b' failed to load") == 1
    await bench.look(20)
    for _ in range(3):
        with pytest.raises(AdapterUnavailable, match="holds NaN"):
            await bench.ask("b")
    assert bench.reader.reads == 1, "no storm of reads"
    assert caplog.text.count("'b' failed to load") == 1
    put(bench, "b", b"good")
    await bench.look()
    asked = asyncio.create_task(bench.ask("b"))
    await bench.look(STILL)
    assert await asked


async def test_a_defect_is_told_and_tried_again_after_a_while(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await bench.manager.start()
    bench.reader.error = RuntimeError("CUDA out of memory")
    with pytest.raises(AdapterUnavailable, match="out of memory"):
        await bench.ask("a")
    assert caplog.text.count("loading adapter 'a' failed") == 1
    assert bench.registry.get("a").state is State.FAILED
    bench.reader.error = None
    await bench.look(12)
    assert await bench.ask("a")


async def test_who_asks_learns_no_path_of_the_server(bench: Bench) -> None:
    """Operators do."""
    await bench.manager.start()
    bench.reader.put("out", b"weights")
    await bench.look()
    (bench.root / "a" / WEIGHTS_FILE).unlink()
    (bench.root / "out" / WEIGHTS_FILE).unlink()
    (bench.root / "out" / WEIGHTS_FILE).symlink_to(bench.root.parent / "secret")
    bench.reader.error = InvalidAdapter(str(bench.root / "a"), f"is in {bench.root}")
    for name in ("a", "a", "out", "out"):
        asked = asyncio.create_task(bench.ask(name))
        await bench.look(STILL)
        with pytest.raises(LoramuxError) as caught:
            await asked
        told = f"{caught.value.message} {caught.value.metadata}"
        assert str(bench.root) not in told
        assert name in told
        error = bench.registry.get(name).error
        assert error is not None
        assert str(bench.root) in error.message


async def test_a_takeover_that_may_work_later_is_tried_again(bench: Bench) -> None:
    await bench.manager.start()
    old = await bench.ask("a")
    bench.reader.put("pinned", b"x" * 85)
    await bench.look()
    await bench.manager.load("pinned", pin=True)
    put(bench, "a", b"version 2 is longer")
    await bench.look(STILL + 1)
    assert await bench.ask("a") == old
    assert "adapter memory is full" in bench.registry.get("a").warnings[0]
    bench.manager.pin("pinned", False)
    await bench.look(16)
    assert await bench.ask("a") != old
    assert bench.registry.get("a").warnings == ()


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
async def test_a_file_that_is_away_for_a_while(bench: Bench, file: str) -> None:
    await bench.manager.start()
    old = await bench.ask("a")
    content = (bench.root / "a" / file).read_bytes()
    (bench.root / "a" / file).unlink()
    await bench.look(STILL + 2)
    assert await bench.ask("a") == old
    assert file in bench.registry.get("a").warnings[0]
    (bench.root / "a" / file).write_bytes(content + b" ")
    await bench.look(STILL)
    assert await bench.ask("a") != old


async def test_a_folder_that_is_away_for_a_look_is_not_gone(bench: Bench) -> None:
    """`rm -r a; mv a.new a`: a look in between took the adapter away from who asked."""
    await bench.manager.start()
    old = await bench.ask("a")
    aside = bench.root.parent / "aside"
    (bench.root / "a").rename(aside)
    await bench.look()
    assert await bench.ask("a") == old
    aside.rename(bench.root / "a")
    await bench.look(STILL)
    assert await bench.ask("a") == old
    (bench.root / "a").rename(aside)
    await bench.look(2)
    with pytest.raises(AdapterNotFound):
        await bench.ask("a")


async def test_what_an_operator_loaded_from_elsewhere_is_left_alone(bench: Bench) -> None:
    await bench.manager.start()
    bench.reader.put("b", b"another")
    await bench.manager.load("a", "b", replace=True)
    entry = bench.registry.get("a")
    put(bench, "a", b"version 2")
    await bench.look(STILL + 1)
    assert bench.registry.get("a") is entry


async def test_what_an_operator_loaded_from_its_folder_is_looked_after(bench: Bench) -> None:
    """`--adapter a` reads it at start, and a new version of it would never have been noticed."""
    await bench.manager.start()
    old, _ = await bench.manager.load("a", pin=True)
    put(bench, "a", b"version 2")
    await bench.look(STILL)
    new = bench.registry.get("a")
    assert new is not old
    assert new.pinned
    shutil.rmtree(bench.root / "a")
    await bench.look(3)
    assert bench.registry.get("a") is new, "but it goes by the operator's word only"


async def test_what_a_link_leads_to_is_taken_over_when_it_leads_elsewhere(bench: Bench) -> None:
    bench.reader.put("v2", b"version 2")
    (bench.root / "current").symlink_to("a")
    await bench.manager.start()
    assert await bench.ask("current") == await bench.ask("a")
    (bench.root / ".next").symlink_to("v2")
    (bench.root / ".next").replace(bench.root / "current")
    await bench.look(STILL)
    assert await bench.ask("current") == await bench.ask("v2")
    assert bench.registry.get("current").source == str(bench.root / "v2")


@pytest.mark.parametrize("by", ["unload", "replace"])
async def test_an_operator_comes_before_a_takeover_that_runs(bench: Bench, by: str) -> None:
    await bench.manager.start()
    await bench.ask("a")
    bench.reader.put("b", b"another")
    put(bench, "a", b"version 2")
    await bench.look(STILL - 1)
    bench.reader.gate.clear()
    await bench.catalog.look()
    await until(lambda: bench.registry.loading("a"))
    if by == "unload":
        await bench.manager.unload("a")
        bench.reader.gate.set()
        assert bench.registry.find("a") is None
    else:
        load = asyncio.create_task(bench.manager.load("a", "b", replace=True))
        bench.reader.gate.set()
        entry, _ = await load
        assert bench.registry.get("a") is entry
    await bench.look(STILL)
    assert (bench.registry.find("a") is None) is (by == "unload")


async def test_an_operator_who_says_so_need_not_wait(bench: Bench) -> None:
    await bench.manager.start()
    old = await bench.ask("a")
    put(bench, "a", b"version 2")
    await bench.manager.reload()
    assert await bench.ask("a") != old
    shutil.rmtree(bench.root / "a")
    await bench.manager.reload()
    assert bench.registry.find("a") is None


# What cannot be served.

NAMES = ["Qwen2.5-7B_lora+sft", "my adapter", "sft@v2", "lr=2e-4", "_v0-base", "résumé", "x" * 129, "\x1b[31mred"]


async def test_folders_that_cannot_be_names_are_told_once_each(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for name in NAMES:
        bench.reader.put(name, b"weights")
    (bench.root / "my notes").mkdir()
    await bench.manager.start()
    await bench.look(3)
    assert [entry.name for entry in bench.manager.list()] == ["a"]
    for name in NAMES:
        assert sum(repr(name) in record.message for record in caplog.records) == 1
        with pytest.raises(AdapterNotFound, match="there is a folder of that name, but it has no name that can be"):
            bench.registry.get(name)
    assert "my notes" not in caplog.text
    for name in ("my notes", "+", ""):
        with pytest.raises(AdapterNotFound, match=r"characters of \[A-Za-z0-9\._-\]"):
            bench.registry.get(name)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def outside(path: Path) -> None:
    target = path.parent.parent / "outside"
    if not target.exists():
        FakeReader(path.parent.parent).put("outside", b"a secret")
    path.symlink_to(target)


def file_outside(path: Path) -> None:
    if not (path.parent / ".scratch").exists():
        outside(path.parent / ".scratch")
    path.mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (path / file).symlink_to(path.parent.parent / "outside" / file)


def half(path: Path) -> None:
    path.mkdir()
    (path / CONFIG_FILE).write_text("{}")


def file_loop(path: Path) -> None:
    half(path)
    (path / WEIGHTS_FILE).symlink_to(WEIGHTS_FILE)


def file_nowhere(path: Path) -> None:
    half(path)
    (path / WEIGHTS_FILE).symlink_to("nowhere")


def pipe(path: Path) -> None:
    half(path)
    os.mkfifo(path / WEIGHTS_FILE)


def folder_as_file(path: Path) -> None:
    half(path)
    (path / WEIGHTS_FILE).mkdir()


UNFIT = {
    "in a circle": [loop, file_loop],
    "leads nowhere": [nowhere, file_nowhere],
    "leads outside": [outside, file_outside],
    "not a regular file": [pipe, folder_as_file],
    f"has no {WEIGHTS_FILE}": [half],
}


@pytest.mark.parametrize(
    ("says", "make"), [(says, make) for says, makes in UNFIT.items() for make in makes], ids=lambda v: str(v)[:20]
)
async def test_what_cannot_be_served_is_told_and_blinds_nothing_else(
    bench: Bench, caplog: pytest.LogCaptureFixture, says: str, make: Callable[[Path], None]
) -> None:
    """A link in a circle beside them took every adapter of the root away."""
    make(bench.root / "AAA")
    make(bench.root / "zzz")
    bench.reader.put("b", b"weights")
    await bench.manager.start()
    await bench.look(3)
    assert [entry.name for entry in bench.manager.list()] == ["a", "b"]
    for name in ("AAA", "zzz"):
        assert sum(repr(name) in r.message and says in r.message for r in caplog.records) == 1, caplog.text
        with pytest.raises(AdapterNotFound, match=says):
            await bench.ask(name)
    (bench.root / "zzz").rename(bench.root.parent / "aside")
    bench.reader.put("zzz", b"weights")
    await bench.look()
    await bench.ask("zzz")


@pytest.mark.parametrize("make", [outside, file_outside, file_loop, file_nowhere, pipe, folder_as_file, half])
async def test_what_is_served_and_becomes_unfit_serves_on(
    bench: Bench, caplog: pytest.LogCaptureFixture, make: Callable[[Path], None]
) -> None:
    await bench.manager.start()
    old = await bench.ask("a")
    (bench.root / "a").rename(bench.root.parent / "aside")
    make(bench.root / "a")
    await bench.look(STILL + 3)
    assert await bench.ask("a") == old
    assert "goes on serving" in bench.registry.get("a").warnings[0]
    assert caplog.text.count("goes on serving") == 1


async def test_a_new_folder_is_not_told_while_its_other_file_is_on_its_way(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.manager.start()
    half(bench.root / "new")
    await bench.look()
    (bench.root / "new" / WEIGHTS_FILE).write_bytes(b"weights")
    await bench.look()
    assert await bench.ask("new")
    assert "new" not in caplog.text


async def test_a_root_that_is_away_is_told_once_and_unloads_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.manager.start()
    old = await bench.ask("a")
    away = bench.root.parent / "away"
    bench.root.rename(away)
    await bench.look(5)
    assert await bench.ask("a") == old
    assert caplog.text.count("cannot be read") == 1
    away.rename(bench.root)
    await bench.look(5)
    assert await bench.ask("a") == old


async def test_the_watch_survives_whatever_a_look_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(tmp_path)
    registry = AdapterRegistry()
    manager = AdapterManager(registry, AdapterRoots([tmp_path]), reader, scan_interval=0.005)
    await manager.start()
    looks = 0

    def failing(*args: object) -> None:
        nonlocal looks
        looks += 1
        raise RecursionError("deep")

    with monkeypatch.context() as patch:
        patch.setattr("loramux.lora.catalog.scan", failing)
        await until(lambda: looks >= 5)
    reader.put("late", b"weights")
    await until(lambda: registry.find("late"))
    assert caplog.text.count("looking for adapters failed") == 1
    await manager.close()


async def test_one_that_cannot_be_looked_after_is_told_and_fails_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = bench.registry.register

    def failing(name: str, *args: object, **more: object) -> AdapterEntry:
        if name == "b":
            raise KeyError("a defect")
        return register(name, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.registry, "register", failing)
    for name in ("b", "c"):
        bench.reader.put(name, b"weights")
    await bench.manager.start()
    await bench.look(3)
    assert [entry.name for entry in bench.manager.list()] == ["a", "c"]
    assert caplog.text.count("a defect") >= 1


# A Hugging Face cache.


def cached(root: Path, repository: str, *revisions: str, main: str = "") -> Path:
    """A repository as huggingface_hub lays it out."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    for revision in revisions:
        snapshot = folder / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for file, content in ((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, f"weights of {revision}".encode())):
            blob = folder / "blobs" / f"{revision}-{file}"
            blob.write_bytes(content)
            (snapshot / file).symlink_to(f"../../blobs/{blob.name}")
    if main:
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(main)
    return folder


async def test_a_hugging_face_cache_is_a_root(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached(tmp_path, "acme/sql-lora", "1" * 40, "2" * 40, main="2" * 40)
    cached(tmp_path, "acme/only", "3" * 40)
    cached(tmp_path, "acme/unclear", "4" * 40, "5" * 40)
    for snapshot in "67":
        (tmp_path / "models--acme--base/snapshots" / snapshot).mkdir(parents=True)
    bench = Bench(tmp_path)
    await bench.manager.start()
    assert "'acme--unclear'" in caplog.text
    assert "acme--base" not in caplog.text
    with pytest.raises(AdapterNotFound, match="several snapshots"):
        await bench.ask("acme--unclear")
    assert [entry.name for entry in bench.manager.list()] == ["acme--only", "acme--sql-lora"]
    two = await bench.ask("acme--sql-lora")
    named, _ = await bench.manager.load("x", f"models--acme--sql-lora/snapshots/{'2' * 40}")
    assert named.digest == two
    (tmp_path / "models--acme--sql-lora/refs/main").write_text("1" * 40)
    await bench.look(STILL)
    assert await bench.ask("acme--sql-lora") != two
    await bench.manager.close()


async def test_a_pipe_in_a_cache_does_not_hold_the_watch(tmp_path: Path) -> None:
    os.mkfifo(cached(tmp_path, "acme/sql-lora", "1" * 40, main="x") / "refs/pipe")
    (tmp_path / "models--acme--sql-lora/refs/pipe").rename(tmp_path / "models--acme--sql-lora/refs/main")
    bench = Bench(tmp_path)
    await bench.manager.start()
    assert [entry.name for entry in bench.manager.list()] == ["acme--sql-lora"]
    await bench.manager.close()


async def test_one_repository_of_the_cache_is_a_root(tmp_path: Path) -> None:
    bench = Bench(cached(tmp_path, "acme/sql-lora", "1" * 40, main="1" * 40))
    await bench.manager.start()
    assert [entry.name for entry in bench.manager.list()] == ["acme--sql-lora"]
    assert await bench.ask("acme--sql-lora")
    await bench.manager.close()


# Many.


async def test_many_folders_are_registered_in_pieces(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for i in range(1000):
        bench.reader.put(f"n{i}", b"")
    most = 0

    async def others() -> None:
        nonlocal most
        while True:
            before = len(bench.registry._entries)
            await asyncio.sleep(0)
            most = max(most, len(bench.registry._entries) - before)

    beside = asyncio.create_task(others())
    await bench.manager.start()
    beside.cancel()
    assert len(bench.manager.list()) == 1000
    assert 0 < most < 1000
    await bench.manager.close()


def test_near_names_are_found_among_many_at_a_bounded_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = AdapterRegistry()
    for i in range(3000):
        registry.register(f"customer-{i:05}", "/x")
    for asked in ("customer-01234x", "customre-01234", "Customer-01234"):
        with pytest.raises(AdapterNotFound, match="did you mean 'customer-01234'"):
            registry.get(asked)
    for name in ("date", "sql"):
        registry.register(name, "/x")
    for asked, meant in (("dat", "date"), ("dtae", "date"), ("sq", "sql")):  # shorter than four letters, or near it
        with pytest.raises(AdapterNotFound, match=f"^there is no adapter '{asked}'; did you mean '{meant}'\\?$"):
            registry.get(asked)
    registry.unload("customer-01234")
    with pytest.raises(AdapterNotFound) as caught:
        registry.get("customer-01234")
    assert "'customer-01234' or" not in caught.value.message
    compared = 0

    class Counting:
        def __init__(self, **_: object) -> None:
            pass

        def set_seq1(self, text: str) -> None:
            nonlocal compared
            compared += 1

        def real_quick_ratio(self) -> float:
            return 0.0

    monkeypatch.setattr("loramux.lora.near_names.SequenceMatcher", Counting)
    with pytest.raises(AdapterNotFound):
        registry.get("customer-x")
    assert 0 < compared <= 128


async def test_a_link_that_changes_while_it_is_looked_at_blinds_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.root / "b").symlink_to("a")
    bench.reader.put("c", b"weights")

    def vanishing(path: str) -> str:
        raise FileNotFoundError(2, "it was a link when it was looked at", path)

    with monkeypatch.context() as patch:
        patch.setattr("loramux.lora.scan.os.path.realpath", vanishing)
        await bench.manager.start()
        await bench.look()
    assert {"a", "c"} <= {entry.name for entry in bench.manager.list()}

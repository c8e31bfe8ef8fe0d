"""Loads and unloads while requests run: nothing hangs, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from loramux.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterUnavailable,
    Cancelled,
    DeadlineExceeded,
    Draining,
    InvalidAdapter,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    PathNotAllowed,
)
from loramux.lora.entry import State
from loramux.lora.folder import AdapterFolder
from loramux.lora.manager import AdapterManager
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import CONFIG_FILE, AdapterRoots

from tests.lora.fakes import FakeAdapter, FakeReader
from tests.patience import PATIENCE

pytestmark = pytest.mark.timeout(2 * PATIENCE)


@pytest.fixture
def reader(tmp_path: Path) -> FakeReader:
    reader = FakeReader(tmp_path)
    reader.put("a", b"0123456789")
    reader.put("b", b"other content")
    return reader


@pytest.fixture
async def manager(reader: FakeReader) -> AsyncIterator[AdapterManager]:
    manager = AdapterManager(
        AdapterRegistry(device_budget=100), AdapterRoots([reader.root]), reader, load_timeout=10, cancel_grace=0.2
    )
    yield manager
    reader.gate.set()
    await manager.close()
    manager.registry.check()
    assert manager.registry.budget.reserved == 0, "a load gives back what it reserved, however it ends"
    assert not any(entry.state is State.LOADING for entry in manager.list())


async def until(condition: Callable[[], object]) -> None:
    """Wait until something holds that no event tells of."""
    while not condition():
        await asyncio.sleep(0.001)


async def until_loading(manager: AdapterManager, name: str) -> None:
    await until(lambda: manager.registry.loading(name))


async def test_load_use_unload(manager: AdapterManager, reader: FakeReader) -> None:
    entry, already = await manager.load("a", pin=True)
    assert not already
    assert (entry.state, entry.pinned, entry.nbytes, entry.source) == (State.READY, True, 10, str(reader.root / "a"))
    assert manager.get("a") is entry
    assert manager.list() == [entry]
    assert await manager.unload("a") == (10, 0)
    assert entry.weights is None
    assert manager.list() == []
    with pytest.raises(AdapterNotFound):
        await manager.unload("a")


async def test_who_asks_for_an_unloaded_adapter_is_told_so(manager: AdapterManager, reader: FakeReader) -> None:
    """The sentence was that of a name that never was."""

    def asked(name: str) -> str:
        with pytest.raises(AdapterNotFound) as caught:
            manager.registry.lease([name], "r1")
        assert (caught.value.reason, caught.value.metadata) == ("ADAPTER_NOT_FOUND", {"adapter": name})
        return caught.value.message.removeprefix(f"there is no adapter {name!r}; ")

    for name, source in (("a", ""), ("other", "b")):
        await manager.load(name, source)
        await manager.unload(name)
    assert asked("a") == "an operator unloaded it; `loramux adapters load a` brings it back"
    assert asked("other") == "an operator unloaded it", "no folder has that name"
    with pytest.raises(AdapterNotFound, match="an operator unloaded it"):
        await manager.unload("a")
    await manager.load("a")
    manager.registry.unload("a")  # as when its folder has gone
    assert "unloaded" not in asked("a")


def test_few_unloaded_names_are_remembered() -> None:
    registry = AdapterRegistry()
    for i in range(3000):
        registry.register(f"a{i}", "/x")
        registry.unload(f"a{i}", by_operator=True)
    assert list(registry._unloaded) == [f"a{i}" for i in range(3000 - 1024, 3000)]


async def test_the_same_content_again_is_not_placed_again(manager: AdapterManager, reader: FakeReader) -> None:
    """vLLM #33791: a reload read the disk at every step. And a full budget must not refuse what is loaded."""
    manager.registry.budget.limit = 15
    entry, _ = await manager.load("a")
    reader.put("copy", b"0123456789")
    for source in ("", "a", "copy"):
        for replace in (False, True):
            assert await manager.load("a", source, replace=replace) == (entry, True)
    assert reader.reads == 1
    assert not entry.pinned
    await manager.load("a", pin=True)
    assert entry.pinned


async def test_other_content_needs_replace(manager: AdapterManager) -> None:
    old, _ = await manager.load("a", pin=True)
    with pytest.raises(AdapterExists, match="replace"):
        await manager.load("a", "b")
    assert manager.get("a") is old
    new, already = await manager.load("a", "b", replace=True)
    assert not already
    assert manager.get("a") is new
    assert new.pinned, "an operator's pin outlives a new version"
    assert old.state is State.UNLOADED


async def test_requests_keep_what_they_leased_over_a_replacement(manager: AdapterManager) -> None:
    old, _ = await manager.load("a")
    manager.registry.lease(["a"], "r1")
    new, _ = await manager.load("a", "b", replace=True)
    assert old.state is State.DRAINING
    assert old.weights is not None
    assert manager.registry.lease(["a"], "r2")[0].entry is new
    manager.registry.release(old.uid, "r1")
    assert old.weights is None


async def test_a_failed_first_load_leaves_the_reason_and_no_bytes(manager: AdapterManager, reader: FakeReader) -> None:
    """LoRAX: a failed load kept its memory budget for good."""
    reader.error = InvalidAdapter("q_proj.lora_B.weight", "holds 3 NaN or Inf among 80 numbers")
    with pytest.raises(InvalidAdapter, match="holds 3 NaN"):
        await manager.load("a")
    entry = manager.get("a")
    assert entry.state is State.FAILED
    assert entry.error is not None
    assert "q_proj.lora_B.weight: holds 3 NaN or Inf among 80 numbers" in entry.error.message
    assert manager.registry.budget.used == manager.registry.budget.reserved == 0
    reader.error = None
    again, _ = await manager.load("a")
    assert manager.list() == [again]
    assert await manager.unload("a") == (10, 0)


async def test_a_failed_replacement_leaves_no_trace(manager: AdapterManager, reader: FakeReader) -> None:
    old, _ = await manager.load("a")
    reader.error = InvalidAdapter("r", "is a lie")
    with pytest.raises(InvalidAdapter):
        await manager.load("a", "b", replace=True)
    assert manager.list() == [old]
    assert old.state is State.READY


@pytest.mark.parametrize("validate_only", [False, True])
async def test_a_failed_load_frees_what_it_read_at_once(
    manager: AdapterManager, reader: FakeReader, validate_only: bool
) -> None:
    """A frame that holds its own exception keeps what it read until the next full garbage collection: files pile up."""

    class Bytes(bytearray):
        """Like what the reader holds, but one can look whether it is gone."""

    seen: list[weakref.ref[Bytes]] = []

    def read(folder: AdapterFolder) -> FakeAdapter:
        data = Bytes(100)
        seen.append(weakref.ref(data))
        raise InvalidAdapter("x", "broken")

    manager._loader._read = read
    gc.disable()
    try:
        with contextlib.suppress(InvalidAdapter):
            await manager.load("a", validate_only=validate_only)
        await asyncio.sleep(0.01)
        assert seen[0]() is None
    finally:
        gc.enable()


async def test_a_defect_is_told_in_one_sentence(
    manager: AdapterManager, reader: FakeReader, caplog: pytest.LogCaptureFixture
) -> None:
    reader.error = RuntimeError("CUDA out of memory")
    with pytest.raises(AdapterUnavailable, match="RuntimeError: CUDA out of memory"):
        await manager.load("a")
    assert "Traceback" in caplog.text
    assert manager.get("a").state is State.FAILED


@pytest.mark.parametrize(
    ("name", "source", "error"),
    [
        ("bad/name", "a", InvalidRequest),
        ("x", "nowhere", InvalidAdapter),
        ("x", "../../etc", PathNotAllowed),
        ("x", "/etc", PathNotAllowed),
        ("x", "a\0", InvalidRequest),
        ("nowhere", "", InvalidAdapter),
    ],
)
async def test_a_source_that_is_none_leaves_no_entry(
    manager: AdapterManager, name: str, source: str, error: type[LoramuxError]
) -> None:
    """Otherwise every mistyped name would stay in the registry for ever."""
    with pytest.raises(error):
        await manager.load(name, source)
    assert manager.list() == []


async def test_the_budget_is_checked_before_reading(manager: AdapterManager, reader: FakeReader) -> None:
    reader.put("large", b"x" * 95)
    await manager.load("a", pin=True)
    with pytest.raises(Overloaded) as caught:
        await manager.load("large")
    assert caught.value.reason == "ADAPTER_BUDGET_EXCEEDED"
    assert reader.reads == 1
    await manager.unload("a")
    entry, _ = await manager.load("large")
    assert entry.nbytes == 95


async def test_loads_that_run_side_by_side_cannot_overbook(manager: AdapterManager, reader: FakeReader) -> None:
    reader.put("x", b"x" * 60)
    reader.put("y", b"y" * 60)
    results = await asyncio.gather(manager.load("x", pin=True), manager.load("y", pin=True), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Overloaded", "tuple"]


async def test_a_slow_load_holds_up_nobody_else(manager: AdapterManager, reader: FakeReader) -> None:
    """vLLM #31941, LoRAX: one slow load blocked the loop, or every other load."""
    quick = FakeReader(reader.root)
    manager._loader._read = lambda folder: (reader if folder.path.name == "a" else quick)(folder)
    reader.gate.clear()
    slow = asyncio.create_task(manager.load("a"))
    await until_loading(manager, "a")
    handle = manager.registry.lease(["a"], "r1")[0]
    entry, _ = await manager.load("b")
    assert entry.state is State.READY
    assert handle.weights is None
    reader.gate.set()
    await slow
    assert handle.weights is not None


async def test_concurrent_loads_of_one_name_read_once(manager: AdapterManager, reader: FakeReader) -> None:
    reader.gate.clear()
    loads = [asyncio.create_task(manager.load("a")) for _ in range(10)]
    await until_loading(manager, "a")
    reader.gate.set()
    results = await asyncio.gather(*loads)
    assert len({entry.uid for entry, _ in results}) == 1
    assert sorted(already for _, already in results) == [False] + [True] * 9
    assert reader.reads == 1


async def test_a_caller_who_goes_away_leaves_the_load_to_finish(manager: AdapterManager, reader: FakeReader) -> None:
    reader.gate.clear()
    caller = asyncio.create_task(manager.load("a"))
    await until_loading(manager, "a")
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    reader.gate.set()
    entry, already = await manager.load("a")
    assert already
    assert entry.state is State.READY
    assert manager.registry.budget.reserved == 0


async def test_a_caller_who_goes_away_before_a_failure(manager: AdapterManager, reader: FakeReader) -> None:
    """Nobody is left to see the exception; asyncio would report it as never retrieved."""
    reader.gate.clear()
    reader.error = InvalidAdapter("x", "broken")
    caller = asyncio.create_task(manager.load("a"))
    await until_loading(manager, "a")
    caller.cancel()
    reader.gate.set()
    await until(lambda: manager.get("a").state is not State.LOADING)
    assert manager.get("a").state is State.FAILED


async def test_a_load_that_takes_too_long_fails_and_gives_its_bytes_back_late(reader: FakeReader) -> None:
    """The thread cannot be stopped and still holds memory: until it ends, its bytes are not given to others."""
    roots = AdapterRoots([reader.root])
    manager = AdapterManager(AdapterRegistry(device_budget=100), roots, reader, load_timeout=0.2)
    reader.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await manager.load("a")
    assert manager.get("a").state is State.FAILED
    assert manager.registry.budget.reserved == 10
    reader.gate.set()
    await until(lambda: manager.registry.budget.reserved == 0)
    assert manager.get("a").weights is None, "a result that comes too late is dropped"
    await manager.close()


async def test_unload_while_loading(manager: AdapterManager, reader: FakeReader) -> None:
    reader.gate.clear()
    load = asyncio.create_task(manager.load("a"))
    await until_loading(manager, "a")
    handle = manager.registry.lease(["a"], "r1")[0]
    assert await manager.unload("a") == (0, 0)
    with pytest.raises(Cancelled, match="unloaded while it was loading"):
        await load
    assert isinstance(handle.error, AdapterUnavailable), "requests that wait for it must learn of it"
    assert manager.list() == []
    reader.gate.set()


async def test_unload_while_a_replacement_loads_ends_both(manager: AdapterManager, reader: FakeReader) -> None:
    await manager.load("a")
    reader.gate.clear()
    load = asyncio.create_task(manager.load("a", "b", replace=True))
    await until_loading(manager, "a")
    assert await manager.unload("a") == (10, 0)
    with pytest.raises(Cancelled):
        await load
    reader.gate.set()
    await asyncio.sleep(0.05)
    assert manager.list() == [], "a replacement must not bring an unloaded name back"


async def test_unload_at_every_moment_of_a_load(manager: AdapterManager) -> None:
    """Whatever a load is at, after an unload the name is gone and nothing is reserved."""
    for turns in range(0, 40, 2):
        load = asyncio.create_task(manager.load("a"))
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        try:
            await manager.unload("a")
        except AdapterNotFound:
            await load  # it had not begun when we asked
            await manager.unload("a")
        await asyncio.gather(load, return_exceptions=True)
        assert manager.list() == []
        manager.registry.check()


async def test_unload_waits_for_requests(manager: AdapterManager) -> None:
    entry, _ = await manager.load("a")
    for request in ("r1", "r2"):
        manager.registry.lease(["a"], request)
    unload = asyncio.create_task(manager.unload("a"))
    await asyncio.sleep(0.01)
    assert entry.state is State.DRAINING
    manager.registry.release(entry.uid, "r1")
    manager.registry.release(entry.uid, "r1")  # SGLang #25864: an abort released twice, and the drain ended too early
    await asyncio.sleep(0.01)
    assert not unload.done()
    manager.registry.release(entry.uid, "r2")
    assert await unload == (10, 0)


async def test_unload_after_aborts_and_n_sequences_does_not_hang(manager: AdapterManager) -> None:
    """SGLang #25864, #34205: aborted requests and n > 1 made a counter drift, and unload waited for ever.

    Each request here takes and gives back as often as its sequences and error paths would: unevenly.
    """
    entry, _ = await manager.load("a")
    for index in range(50):
        for _ in range(1 + index % 3):
            manager.registry.lease(["a"], f"r{index}")
        for _ in range(1 + index % 2):
            manager.registry.release(entry.uid, f"r{index}")
    assert await asyncio.wait_for(manager.unload("a"), PATIENCE) == (10, 0)


async def test_drain_timeout_without_cancel_fails_and_drains_on(manager: AdapterManager) -> None:
    entry, _ = await manager.load("a")
    manager.registry.lease(["a"], "r1")
    with pytest.raises(DeadlineExceeded, match="still serves 1 request"):
        await manager.unload("a", drain_timeout=0.02)
    assert entry.state is State.DRAINING
    manager.registry.release(entry.uid, "r1")
    assert entry.state is State.UNLOADED
    assert manager._gone == {}


async def test_a_second_unload_joins_the_drain_and_may_cancel(manager: AdapterManager) -> None:
    """After a timeout the name is gone; answering NOT_FOUND would leave the operator no way to cancel."""
    entry, _ = await manager.load("a")
    manager.registry.lease(["a"], "r1")
    first = asyncio.create_task(manager.unload("a"))
    await asyncio.sleep(0)
    cancelled: list[str] = []

    def cancel(request: str) -> None:
        cancelled.append(request)
        manager.registry.release(entry.uid, request)

    assert await manager.unload("a", drain_timeout=0, cancel_after_timeout=True, cancel=cancel) == (10, 1)
    assert cancelled == ["r1"]
    assert await first == (10, 0)


async def test_requests_that_ignore_the_cancel_do_not_hang_the_unload(manager: AdapterManager) -> None:
    await manager.load("a")
    manager.registry.lease(["a"], "stuck")
    with pytest.raises(DeadlineExceeded, match="were cancelled and have not ended"):
        await manager.unload("a", drain_timeout=0, cancel_after_timeout=True, cancel=lambda _: None)


async def test_an_unloader_who_goes_away_leaves_the_drain_to_finish(manager: AdapterManager) -> None:
    entry, _ = await manager.load("a")
    manager.registry.lease(["a"], "r1")
    unload = asyncio.create_task(manager.unload("a"))
    await asyncio.sleep(0.01)
    unload.cancel()
    await asyncio.gather(unload, return_exceptions=True)
    manager.registry.release(entry.uid, "r1")
    assert entry.state is State.UNLOADED
    assert manager.registry.budget.used == 0


async def test_the_name_may_be_loaded_again_while_the_old_one_drains(manager: AdapterManager) -> None:
    old, _ = await manager.load("a")
    manager.registry.lease(["a"], "r1")
    unload = asyncio.create_task(manager.unload("a"))
    await asyncio.sleep(0.01)
    new, already = await manager.load("a")
    assert not already
    assert new.uid != old.uid
    assert [entry.state for entry in manager.list()] == [State.DRAINING, State.READY]
    manager.registry.release(old.uid, "r1")
    assert await unload == (10, 0)
    assert manager.get("a") is new


async def test_validate_only_loads_nothing(manager: AdapterManager, reader: FakeReader) -> None:
    entry, already = await manager.load("a", validate_only=True)
    assert (already, entry.uid, entry.state, entry.weights) == (False, "", State.UNLOADED, None)
    assert (entry.nbytes, entry.target_modules) == (10, ("q_proj",))
    assert entry.digest.startswith("sha256:")
    reader.error = InvalidAdapter("x", "broken")
    with pytest.raises(InvalidAdapter):
        await manager.load("a", validate_only=True)
    assert manager.list() == []
    assert manager.registry.budget.reserved == 0


async def test_watch(manager: AdapterManager) -> None:
    a, _ = await manager.load("a")
    watch = manager.watch()
    seen = [(await anext(watch)).name]
    load = asyncio.create_task(manager.load("b"))
    async for entry in watch:
        seen.append(f"{entry.name} {entry.state.value}")
        if entry.state is State.READY:
            break
    await load
    await watch.aclose()
    assert seen[0] == "a"
    assert seen[-1] == "b ready"
    assert manager._watchers == set()
    assert a.state is State.READY


async def test_close_ends_watches_and_loads(reader: FakeReader) -> None:
    manager = AdapterManager(AdapterRegistry(), AdapterRoots([reader.root]), reader)
    watch = manager.watch()
    waiting = asyncio.create_task(anext(watch))
    reader.gate.clear()
    load = asyncio.create_task(manager.load("a"))
    await until_loading(manager, "a")
    closing = asyncio.create_task(manager.close())
    await asyncio.sleep(0.01)
    reader.gate.set()
    await asyncio.wait_for(closing, PATIENCE)
    with pytest.raises(Draining):
        await load
    assert (await waiting).name == "a"
    assert [entry.state async for entry in watch] == [State.FAILED]
    with pytest.raises(Draining):
        await manager.load("b")
    assert manager.registry.budget.reserved == 0


async def test_close_does_not_wait_for_a_hung_disk(reader: FakeReader) -> None:
    manager = AdapterManager(AdapterRegistry(), AdapterRoots([reader.root]), reader)
    reader.gate.clear()
    load = asyncio.create_task(manager.load("a"))
    await until_loading(manager, "a")
    await until(lambda: reader.reads)
    await asyncio.wait_for(manager.close(grace=0.05), PATIENCE)
    reader.gate.set()
    with pytest.raises(Draining):
        await load


async def test_a_folder_without_files_is_told_by_the_reader(manager: AdapterManager, reader: FakeReader) -> None:
    (reader.root / "a" / CONFIG_FILE).unlink()
    await manager.load("b")
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json"):
        await manager.load("b", "a", replace=True)


async def test_loads_give_way_to_the_model(tmp_path: Path) -> None:
    """Their threads alone: the process, and with it the engine, keeps its place."""
    seen: list[int] = []

    class Reader(FakeReader):
        def __call__(self, folder: AdapterFolder) -> FakeAdapter:
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return super().__call__(folder)

    reader = Reader(tmp_path)
    reader.put("a", b"a")
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    manager = AdapterManager(AdapterRegistry(), AdapterRoots([tmp_path]), reader)
    await manager.load("a")
    assert seen[0] > mine
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
    await manager.close()

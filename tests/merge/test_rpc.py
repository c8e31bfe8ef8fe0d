"""MergeAdapter over gRPC, with the real server, the real worker process and real files."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from loramux import assembly
from loramux.client import Merged, Merging
from loramux.errors import (
    AdapterNotFound,
    AdapterUnavailable,
    Draining,
    EngineFault,
    FolderExists,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    PathNotAllowed,
)
from loramux.merge_process import MergeProcess
from loramux.model import sources
from loramux.rpc.ports import MergeStep

from tests.merge.recipes import STEPS, batched, dense, relative
from tests.patience import PATIENCE
from tests.server.stack import Stack, save_adapter, save_model, serving

# The worker, which waits at its fifth tensor while there is a file `hold`: until somebody writes to `go`, or ends it.
WORKER = """
import os, sys
from pathlib import Path
from loramux.merge_worker import main

folder = Path(sys.argv[1])

def hold(done, total):
    if done == 5 and (folder / "hold").exists():
        (folder / "hold").write_text(str(os.getpid()))
        (folder / "go").read_text()

main(hold)
"""
LOOP = pytest.mark.asyncio(loop_scope="module")
pytestmark = LOOP


@dataclass
class Rig:
    """A server, where it may write, and the file that makes merges wait."""

    stack: Stack
    out: Path
    hold: Path

    def held(self, *, hold: bool) -> None:
        self.hold.write_text("") if hold else self.hold.unlink(missing_ok=True)

    async def empty(self) -> None:
        """Until nothing is in the output's root; fails after ten seconds."""
        async with asyncio.timeout(PATIENCE):
            while list(self.out.iterdir()):
                await asyncio.sleep(0.01)

    async def merge(self, output: str, **how: object) -> list[Merging | Merged]:
        return [step async for step in self.stack.admin.merge("a", output=output, **how)]  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory, python: tuple[str, ...]) -> AsyncIterator[Rig]:
    root = tmp_path_factory.mktemp("merging")
    save_adapter(root / "adapters" / "a")
    save_adapter(root / "adapters" / "b", seed=1)
    (root / "out").mkdir()
    (root / "script.py").write_text(WORKER)
    os.mkfifo(root / "go")
    command = (*python, str(root / "script.py"), str(root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "MergeProcess", partial(MergeProcess, command=command))
        async with serving(save_model(root / "model"), root / "adapters", merge_dir=root / "out") as stack:
            await stack.admin.load("a")
            await stack.admin.load("b")
            yield Rig(stack, root / "out", root / "hold")


async def refused(rig: Rig, kind: type[LoramuxError], match: str, name: str = "a", **how: object) -> LoramuxError:
    steps = rig.stack.admin.merge(name, **{"output": "new", **how})  # type: ignore[arg-type]
    with pytest.raises(kind, match=match) as caught:
        await anext(steps)
    return caught.value


async def test_progress_and_report(rig: Rig) -> None:
    *steps, last = await rig.merge("whole", dtype="fp16")
    assert [s.done for s in steps if isinstance(s, Merging)] == list(range(len(steps)))
    assert {s.total for s in steps if isinstance(s, Merging)} == {len(steps) - 1}
    assert isinstance(last, Merged)
    assert last.output == str(rig.out / "whole")
    report = json.loads((rig.out / "whole" / "merge_report.json").read_text())
    assert (last.overall_error, last.worst_error) == (report["overall_error"], report["worst_error"])
    assert (last.worst_layer, last.layers, last.bytes) == (report["worst_layer"], 21, report["bytes"])
    assert report["adapters"] == [{"name": "a", "digest": (await rig.stack.admin.get("a")).digest, "weight": 1.0}]
    assert len(dense(rig.out / "whole")[1]) == STEPS
    await refused(rig, FolderExists, "name a new folder", output="whole")


async def test_refusals(rig: Rig, tmp_path: Path) -> None:
    await refused(rig, AdapterNotFound, "there is no adapter 'nobody'", name="nobody")
    await refused(rig, InvalidRequest, "name the adapter", name="")
    await refused(rig, InvalidRequest, "not both", mix={"b": 1.0})
    await refused(rig, InvalidRequest, "got nan", name="", mix={"b": float("nan")})
    with pytest.raises(InvalidRequest, match="none of bf16"):
        rig.stack.admin.merge("a", output="new", dtype="int8")
    (rig.out / "link").symlink_to(tmp_path)
    for output in (str(tmp_path / "x"), "../x", "link/x", str(rig.out), "/etc"):
        await refused(rig, PathNotAllowed, "outside --merge-dir", output=output)
    (rig.out / "link").unlink()
    for output in ("", "/", ".hidden", "a/..", "no/parent", "nul\0", "new\nline", "\x1b[2J", "new\n"):
        error = await refused(rig, InvalidRequest, "output", output=output)
        assert error.metadata["field"] == "output"
    assert not os.listdir(tmp_path)


async def test_files_that_changed_since_the_load_are_refused(rig: Rig) -> None:
    folder = rig.stack.application.settings.adapter_dir[0]
    save_adapter(folder / "c", seed=2)
    await rig.stack.admin.load("c")
    save_adapter(folder / "c", seed=3)
    before = sorted(os.listdir(rig.out))
    await refused(rig, AdapterUnavailable, "have changed", name="c")
    assert sorted(os.listdir(rig.out)) == before
    await rig.stack.admin.unload("c")


async def test_a_registered_adapter_is_read_only_under_the_roots(rig: Rig, tmp_path: Path) -> None:
    """A folder that was found and not read yet may be a link; merging must not read what loading may not."""
    roots = rig.stack.application.settings.adapter_dir[0]
    (roots / "linked").symlink_to(save_adapter(tmp_path / "secret"))
    rig.stack.application.adapters.registry.register("linked", str(roots / "linked"))
    await refused(rig, PathNotAllowed, "outside the adapter roots", name="linked")
    await rig.stack.admin.unload("linked")


async def test_dora_is_merged_by_itself_only(rig: Rig) -> None:
    folder = save_adapter(rig.stack.application.settings.adapter_dir[0] / "dora", use_dora=True)
    await rig.stack.admin.load("dora")
    sentence = "'dora' is a DoRA adapter.*ask for it alone"
    error = await refused_at_last(rig, {"a": 0.5, "dora": 0.5})
    assert error.reason == "ADAPTER_NOT_MIXABLE"
    assert re.search(sentence, error.message)
    last = [step async for step in rig.stack.admin.merge("dora", output="of-dora", dtype="fp32")][-1]
    assert isinstance(last, Merged)
    assert 0 < last.overall_error < 1e-5
    expected, greedy = batched(Path(rig.stack.application.settings.model), {folder: 1.0})
    logits, text = dense(rig.out / "of-dora")
    assert relative(logits, expected) < 1e-4
    assert text == greedy


async def refused_at_last(rig: Rig, mix: dict[str, float]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        async for _ in rig.stack.admin.merge(output="mixed", mix=mix):
            pass
    assert not (rig.out / "mixed").exists()
    return caught.value


async def test_an_adapter_that_is_unloaded_meanwhile_is_merged_all_the_same(rig: Rig) -> None:
    folder = save_adapter(rig.stack.application.settings.adapter_dir[0] / "going", seed=7)
    digest = (await rig.stack.admin.load("going")).digest
    rig.held(hold=True)
    steps = rig.stack.admin.merge("going", output="gone")
    async for step in steps:
        if isinstance(step, Merging) and step.done == 5:
            break
    await rig.stack.admin.unload("going")
    shutil.rmtree(folder)
    await asyncio.to_thread((rig.hold.parent / "go").write_text, "go")
    rest = [step async for step in steps]
    rig.held(hold=False)
    assert isinstance(rest[-1], Merged)
    report = json.loads((rig.out / "gone" / "merge_report.json").read_text())
    assert [(a["name"], a["digest"]) for a in report["adapters"]] == [("going", digest)]


async def test_one_at_a_time_requests_meanwhile_and_a_cancel_that_leaves_nothing(rig: Rig) -> None:
    clear(rig.out)
    rig.held(hold=True)
    steps = rig.stack.admin.merge("a", output="cancelled")
    async for step in steps:
        assert isinstance(step, Merging)
        if step.done == 5:
            break
    assert [p.name.startswith(".cancelled") for p in rig.out.iterdir()] == [True]
    error = await refused(rig, Overloaded, "one at a time", output="second")
    assert error.reason == "MERGE_RUNNING"
    assert (await rig.stack.client.generate("hi", adapter="a", max_new_tokens=4)).usage.completion_tokens == 4
    await steps.aclose()
    await rig.empty()
    rig.held(hold=False)
    async with asyncio.timeout(90):  # the server hears of the cancel in its own time
        while True:
            try:
                last = [s async for s in rig.stack.admin.merge(mix={"a": 0.5, "b": -1.0}, output="after")][-1]
                break
            except Overloaded:
                await asyncio.sleep(0.02)
    assert isinstance(last, Merged)
    assert os.listdir(rig.out) == ["after"]
    report = json.loads((rig.out / "after" / "merge_report.json").read_text())
    assert [(a["name"], a["weight"]) for a in report["adapters"]] == [("a", 0.5), ("b", -1.0)]


async def test_a_worker_that_is_killed_is_an_error_and_the_next_merge_clears_its_rest(rig: Rig) -> None:
    clear(rig.out)
    rig.held(hold=True)
    steps = rig.stack.admin.merge("a", output="killed")
    for done in range(6):
        assert await anext(steps) == Merging(done, 29)
    async with asyncio.timeout(PATIENCE):
        while not rig.hold.read_text():
            await asyncio.sleep(0.01)
    os.kill(int(rig.hold.read_text()), signal.SIGKILL)
    with pytest.raises(EngineFault, match="ended before it was done"):
        await anext(steps)
    rig.held(hold=False)
    assert [p.name.startswith(".killed") for p in rig.out.iterdir()] == [True]
    assert isinstance((await rig.merge("killed"))[-1], Merged)
    assert [p.name for p in rig.out.iterdir()] == ["killed"]


async def test_of_a_hubs_base_what_is_served_is_merged(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch may have moved on since the server loaded it. The worker is started as it always is."""
    commit = rig.stack.application.settings.model
    monkeypatch.setattr(sources, "_download", lambda model, revision: Path(commit))
    monkeypatch.setattr(assembly, "MergeProcess", MergeProcess)
    adapters = rig.stack.application.settings.adapter_dir[0]
    async with serving(Path("acme/base"), adapters, merge_dir=tmp_path) as stack:
        await stack.admin.load("a")
        # The worker is a process of its own, where the hub has no such model.
        last = [step async for step in stack.admin.merge("a", output="new")][-1]
    assert isinstance(last, Merged)
    assert json.loads((tmp_path / "new" / "merge_report.json").read_text())["model"] == commit


async def test_a_drain_ends_the_merge(rig: Rig, tmp_path: Path) -> None:
    settings = rig.stack.application.settings
    rig.held(hold=True)
    async with serving(Path(settings.model), settings.adapter_dir[0], merge_dir=tmp_path) as stack:
        await stack.admin.load("a")
        steps = stack.admin.merge("a", output="drained")
        for done in range(6):
            assert await anext(steps) == Merging(done, 29)
        await stack.application.server.drain()
        with pytest.raises(Draining, match="merges no more"):
            await anext(steps)
        assert os.listdir(tmp_path) == []
    rig.held(hold=False)


async def test_without_a_merge_dir_nothing_is_written(rig: Rig, tmp_path: Path) -> None:
    settings = rig.stack.application.settings
    async with serving(Path(settings.model), settings.adapter_dir[0]) as stack:
        await stack.admin.load("a")
        with pytest.raises(PathNotAllowed, match="--merge-dir"):
            await anext(stack.admin.merge("a", output=str(tmp_path / "x")))


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


async def test_ctrl_c_is_not_for_the_worker(tmp_path: Path) -> None:
    """It answered the terminal's signal with a traceback, beside the server's own way out."""
    tells = "import json, os; print(json.dumps({'done': os.getpgrp(), 'total': os.getpid()}))"
    steps = MergeProcess("a/base", tmp_path, command=(sys.executable, "-c", tells)).merge([], "out", "bf16")
    step = await anext(steps)
    await steps.aclose()
    assert isinstance(step, MergeStep)
    assert step.done == step.total

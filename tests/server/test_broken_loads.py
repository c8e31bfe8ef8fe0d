"""Broken adapters of every kind, loaded by an operator and asked for by requests, during good traffic.

Each is refused with its own status, reason and text; no good request fails or answers otherwise; and no byte, no entry,
no lease, no file and no tensor of a broken one stays.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from loramux.errors import LoramuxError
from loramux.lora import peft_files
from loramux.lora.adapter import Adapter
from loramux.lora.folder import AdapterFolder
from loramux.lora.snapshot import FolderSnapshot

from tests.patience import PATIENCE
from tests.server.broken import INVALID, SOURCES, Kind, write_broken
from tests.server.stack import Stack, save_adapter, serving
from tests.server.test_bad_input import Background

pytestmark = pytest.mark.asyncio(loop_scope="module")
VANISHES = "bad-vanishes"


def what_is_held(stack: Stack) -> dict[str, int]:
    """All that must be as it was: counts, bytes of both tiers, open files."""
    tiers = stack.application.adapters.registry.tiers
    return stack.counts() | {
        "host_bytes": tiers.host.used + tiers.host.reserved,
        "waiting": tiers.waiting,
        "files": len(os.listdir("/proc/self/fd")),
    }


def tensors_held() -> int:
    gc.collect()
    return sum(type(thing) in (Adapter, FolderSnapshot) for thing in gc.get_objects())


async def settle(stack: Stack, baseline: dict[str, int], what: str) -> None:
    """Until all in `baseline` is as it was there; fails with the difference if it never is."""

    def differs() -> dict[str, int]:
        return {key: now for key, now in what_is_held(stack).items() if baseline.get(key, now) != now}

    try:
        async with asyncio.timeout(PATIENCE):
            while differs():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"{what}: {differs()} never returned to {baseline}") from None


def refused(error: LoramuxError, kind: Kind, what: str) -> None:
    assert error.status == kind.status, f"{what}: {error.status} {error.message}"
    assert kind.reason in ("", error.reason), f"{what}: {error.reason} {error.message}"
    assert kind.says in error.message, f"{what}: {error.message}"


async def test_broken_loads_during_good_traffic(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    shutil.copytree(folders[1], root)
    kinds = write_broken(root)
    assert len(kinds) >= 25
    take_snapshot = peft_files.take_snapshot

    def vanishing(folder: AdapterFolder, *rest: object) -> FolderSnapshot:
        if folder.path.name == VANISHES:  # it was there when it was measured
            shutil.rmtree(folder.path)
        return take_snapshot(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(peft_files, "take_snapshot", vanishing)

    async with serving(folders[0], root, adapter_memory=4 << 20, adapter_host_memory=1 << 20) as stack:
        good = Background(stack)
        await good.learn()
        registry = stack.application.adapters.registry
        scanned = {entry.name for entry in registry.entries()} & kinds.keys()
        assert len(scanned) >= 25
        for name in scanned:  # from here on each kind begins as a folder that nobody has asked for
            registry.unload(name)
        await stack.admin.list()
        baseline, tensors, files = what_is_held(stack), tensors_held(), sorted(root.rglob("*"))

        # What good requests leave alone while they run; they have leases and KV blocks themselves.
        quiet = {key: baseline[key] for key in ("adapters", "adapter_bytes", "host_bytes", "files")}

        async def by_request(name: str, kind: Kind) -> None:
            registry.register(name, str(root / name))  # as the scan did
            with pytest.raises(LoramuxError) as caught:
                await stack.client.generate("Hello", adapter=name, n=2, max_new_tokens=4)
            error = caught.value
            what = f"{name}, asked for"
            if kind.status == INVALID:
                assert error.status == "FAILED_PRECONDITION", f"{what}: {error.status} {error.message}"
                assert kind.reason in ("", error.metadata["cause"]), f"{what}: {error.metadata}"
            else:
                assert error.status == kind.status, f"{what}: {error.status} {error.message}"
            assert kind.says in error.message, f"{what}: {error.message}"
            assert (await stack.admin.unload(name)).freed_bytes == 0
            await settle(stack, quiet, what)

        async def by_operator(name: str, source: str, kind: Kind, *, validate_only: bool) -> None:
            what = f"{name}, loaded" + " to validate it" * validate_only
            with pytest.raises(LoramuxError) as caught:
                await stack.admin.load(name, source, validate_only=validate_only)
            refused(caught.value, kind, what)
            if registry.find(name) is not None:
                assert not validate_only
                assert (await stack.admin.unload(name)).freed_bytes == 0
            await settle(stack, quiet, what)

        async def all_of_them() -> None:
            for name, kind in kinds.items():
                for validate_only in (True, False):
                    await by_operator(name, name, kind, validate_only=validate_only)
                    if name == VANISHES:
                        save_adapter(root / name)
                if name in scanned:
                    await by_request(name, kind)
            for source, kind in SOURCES.values():
                await by_operator("bad", source, kind, validate_only=False)

        await good.during(all_of_them())  # raises if one good answer is another one than before
        assert good.answers > len(good._expected)
        save_adapter(root / VANISHES)
        assert stack.application.engine.stats().faults == 0
        await settle(stack, baseline, "after all")
        assert tensors_held() == tensors
        assert sorted(root.rglob("*")) == files
        assert list(scratch.iterdir()) == []

"""Adapters that lie under the roots, through the wire: asked for by name, put out, fetched again, changed, removed.

The model's answers depend on the adapter's content, so an answer tells which adapter gave it.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest
from loramux.answers import Result, Started
from loramux.errors import AdapterNotFound, AdapterUnavailable, LoramuxError
from loramux.lora.entry import Residency

from tests.patience import PATIENCE
from tests.rpc.stack import Running, running, write_adapter


async def ask(r: Running, name: str) -> Result:
    return await r.client.generate("hello", adapter=name, max_new_tokens=6, ignore_eos=True)


async def test_what_lies_under_a_root_is_asked_for_by_name(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a", "b"), load=False, scan_interval=0.0) as r:
        assert [(a.state, a.residency, a.size_bytes) for a in (await r.admin.list()).adapters] == [
            ("registered", "disk", 0),
            ("registered", "disk", 0),
        ]
        answer = await ask(r, "a")
        entry = r.registry.get("a")
        assert (answer.adapters[0].uid, answer.adapters[0].digest) == (entry.uid, entry.digest)
        assert entry.digest.startswith("sha256:")
        assert (entry.residency, r.registry.get("b").residency) == (Residency.DEVICE, Residency.DISK)
        with pytest.raises(AdapterNotFound):
            await ask(r, "c")
        await r.settle()


async def test_a_stream_tells_the_digest_of_what_was_never_read(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",), load=False, scan_interval=0.0) as r:
        first, *_ = [event async for event in r.client.stream("hello", adapter="a", max_new_tokens=2)]
        assert isinstance(first, Started)
        assert first.adapters[0].digest == r.registry.get("a").digest != ""


@pytest.mark.parametrize("host_budget", [0, 100])
async def test_many_adapters_share_little_memory(tmp_path: Path, host_budget: int) -> None:
    names = tuple(f"a{i}" for i in range(30))
    for name in names:
        write_adapter(tmp_path, name, f"the weights of {name}".encode())
    async with running(
        tmp_path, adapters=names, load=False, scan_interval=0.0, budget=70, host_budget=host_budget
    ) as r:
        alone = {name: (await ask(r, name)).text for name in names}
        assert len(set(alone.values())) == len(names)
        order = random.Random(7).choices(names, k=200)
        answers = await asyncio.gather(*(ask(r, name) for name in order))
        assert [answer.text for answer in answers] == [alone[name] for name in order]
        assert r.registry.tiers.evictions > 30
        await r.settle()
        assert r.registry.tiers.device.used <= 70
        assert (r.registry.tiers.host.used > 0) == (host_budget > 0)


async def test_mixes_that_do_not_fit_together_take_turns(tmp_path: Path) -> None:
    names = tuple(f"a{i}" for i in range(8))
    async with running(tmp_path, adapters=names, load=False, scan_interval=0.0, budget=30) as r:
        pairs = [(first, second) for first in names for second in names if first != second]
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(
                *(r.client.generate("hi", mix={x: 0.5, y: 0.5}, max_new_tokens=3, ignore_eos=True) for x, y in pairs)
            )
        await r.settle()


async def test_broken_adapters_harm_nobody_else(tmp_path: Path) -> None:
    good, bad = tuple(f"good{i}" for i in range(5)), tuple(f"bad{i}" for i in range(25))
    for name in bad:
        write_adapter(tmp_path, name, b"bad" + name.encode())
    async with running(tmp_path, adapters=(*good, *bad), load=False, scan_interval=0.0, budget=60) as r:
        alone = {name: (await ask(r, name)).text for name in good}

        async def outcome(name: str) -> str:
            try:
                return (await ask(r, name)).text
            except LoramuxError as error:
                assert isinstance(error, AdapterUnavailable)
                assert "NaN" in error.message
                return "refused"

        order = [name for i in range(25) for name in (bad[i], good[i % 5], bad[i], good[(i + 1) % 5])]
        found = await asyncio.gather(*map(outcome, order))
        assert found == [alone.get(name, "refused") for name in order]
        await r.settle()
        assert r.registry.tiers.device.reserved == 0


async def test_folders_come_change_and_go(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",), load=False, scan_interval=0.02) as r:
        before = await ask(r, "a")

        async def until(name: str, digest_not: str = "") -> None:
            async with asyncio.timeout(PATIENCE):
                while r.registry.find(name) is None or (digest_not and r.registry.get(name).digest == digest_not):
                    await asyncio.sleep(0.01)

        write_adapter(tmp_path, "new", b"the weights of new")
        await until("new")
        await ask(r, "new")
        changed = write_adapter(tmp_path / "elsewhere", "a", b"quite other weights")
        shutil.rmtree(tmp_path / "a")
        changed.rename(tmp_path / "a")
        await until("a", digest_not=before.adapters[0].digest)
        after = await ask(r, "a")
        assert after.adapters[0].digest != before.adapters[0].digest
        assert after.text != before.text
        shutil.rmtree(tmp_path / "new")
        async with asyncio.timeout(PATIENCE):
            while r.registry.find("new") is not None:
                await asyncio.sleep(0.01)
        with pytest.raises(AdapterNotFound):
            await ask(r, "new")
        await r.settle()


async def looked(r: Running) -> None:
    """After several looks at the roots, beside those that come by themselves."""
    catalog = r.manager._catalog
    assert catalog is not None
    for _ in range(4):
        await catalog.look()


async def test_a_root_that_is_away_for_a_moment_keeps_its_adapters(tmp_path: Path) -> None:
    root, away = tmp_path / "root", tmp_path / "away"
    async with running(root, adapters=("a",), load=False, scan_interval=0.02) as r:
        entry = r.registry.get("a")
        await ask(r, "a")
        root.rename(away)
        await looked(r)
        assert r.registry.get("a") is entry
        await ask(r, "a")
        away.rename(root)
        await looked(r)
        assert r.registry.get("a") is entry
        await r.settle()


async def test_what_an_operator_unloaded_stays_away_until_its_folder_changes(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",), load=False, scan_interval=0.02) as r:
        await ask(r, "a")
        await r.admin.unload("a")
        await looked(r)
        with pytest.raises(AdapterNotFound):
            await ask(r, "a")
        await r.admin.load("a")
        await ask(r, "a")


async def test_metrics_tell_where_adapters_were(tmp_path: Path) -> None:
    async with running(
        tmp_path, adapters=("a", "b", "c"), load=False, scan_interval=0.0, budget=24, host_budget=12
    ) as r:
        await ask(r, "a")
        await r.admin.pin("a")  # or it would depend on how long loads took which one goes
        for name in ("b", "a", "c", "a"):
            await ask(r, name)
        await r.settle()
        text = await asyncio.to_thread(r.server.metrics.render)
        found = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
        assert found['loramux_adapter_lookups_total{tier="device"}'] == "2.0"
        assert found['loramux_adapter_lookups_total{tier="disk"}'] == "3.0"
        assert found["loramux_adapter_evictions_total"] == "1.0"
        assert found['loramux_adapter_residency{tier="device"}'] == "2.0"
        assert found['loramux_adapter_residency{tier="host"}'] == "1.0"
        assert found["loramux_adapter_host_bytes"] == "12.0"
        assert found["loramux_adapter_load_seconds_count"] == "3.0"

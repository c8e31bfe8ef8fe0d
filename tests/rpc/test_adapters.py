"""AdapterService, through the client, over the real manager and registry."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from loramux.errors import InvalidAdapter
from loramux.v1 import adapters_pb2

from tests.patience import PATIENCE
from tests.rpc.stack import adapter_stub, endless, running, write_adapter


async def test_load_list_get_pin_unload(tmp_path: Path) -> None:
    write_adapter(tmp_path, "one", b"12345")
    write_adapter(tmp_path, "two", b"1234567")
    async with running(tmp_path, budget=1000) as r:
        one = await r.admin.load("one", pin=True)
        assert (one.name, one.state, one.residency, one.pinned) == ("one", "ready", "device", True)
        assert (one.device_bytes, one.max_rank, one.target_modules, one.sites) == (5, 8, ("q_proj",), 2)
        assert one.digest.startswith("sha256:")
        assert one.source == str(tmp_path / "one")
        assert one.loaded_at is not None
        assert abs((datetime.now(UTC) - one.loaded_at).total_seconds()) < 60
        assert one.last_used_at is None
        await r.admin.load("second", "two")
        listed = await r.admin.list()
        assert [a.name for a in listed.adapters] == ["one", "second"]
        assert (listed.device_bytes, listed.device_budget_bytes) == (12, 1000)
        await r.client.generate("x", adapter="second", max_new_tokens=1)
        assert (await r.admin.get("second")).last_used_at is not None
        assert not (await r.admin.pin("one", False)).pinned
        assert (await r.admin.pin("one")).pinned
        assert (await r.admin.unload("one")).freed_bytes == 5
        assert [a.name for a in (await r.admin.list()).adapters] == ["second"]


async def test_the_same_content_again_is_no_error(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a")
    async with running(tmp_path) as r, grpc.aio.insecure_channel(r.addresses.admin) as channel:
        stub = adapter_stub(channel)
        first = await stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="a"))
        again = await stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="a"))
        assert (first.already_loaded, again.already_loaded) == (False, True)
        assert first.adapter.uid == again.adapter.uid


async def test_validate_only_loads_nothing(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a")
    async with running(tmp_path) as r:
        described = await r.admin.load("a", validate_only=True)
        assert (described.max_rank, described.state) == (8, "unloaded")
        assert (await r.admin.list()).adapters == ()


async def test_pages_hold_every_adapter_once(tmp_path: Path) -> None:
    """Two adapters of one name stand in the list while the old one drains; a page that ended there lost one."""
    names = [f"n{i}" for i in range(5)]
    async with (
        running(tmp_path, adapters=tuple(names), script=endless) as r,
        grpc.aio.insecure_channel(r.addresses.admin) as channel,
    ):
        stream = r.client.stream("hi", adapter="n2")
        await anext(stream)
        (tmp_path / "n2" / "adapter_model.safetensors").write_bytes(b"new")
        await r.admin.load("n2", replace=True)
        seen, token = [], ""
        stub = adapter_stub(channel)
        for _ in range(10):
            page = await stub.ListAdapters(adapters_pb2.ListAdaptersRequest(page_size=1, page_token=token))
            assert len(page.adapters) == 1
            seen += [(a.name, a.state) for a in page.adapters]
            token = page.next_page_token
            if not token:
                break
        assert sorted(name for name, _ in seen) == sorted([*names, "n2"])
        assert {state for name, state in seen if name == "n2"} == {
            adapters_pb2.ADAPTER_STATE_READY,
            adapters_pb2.ADAPTER_STATE_DRAINING,
        }
        await stream.aclose()


async def test_watch_tells_what_is_and_what_changes(tmp_path: Path) -> None:
    write_adapter(tmp_path, "b", b"bad")
    async with running(tmp_path, adapters=("a",)) as r:
        watch = r.admin.watch()
        first = await anext(watch)
        assert (first.name, first.state) == ("a", "ready")
        await asyncio.gather(r.admin.load("b"), return_exceptions=True)
        await r.admin.unload("a")
        seen = []
        async for adapter in watch:
            seen.append((adapter.name, adapter.state))
            if adapter.state == "failed":
                assert "holds NaN" in adapter.error
            if adapter.state == "unloaded":
                break
        assert ("b", "failed") in seen
        assert seen[-1] == ("a", "unloaded")
        await watch.aclose()


async def test_a_request_waits_for_an_adapter_that_loads(tmp_path: Path) -> None:
    """Nobody woke the engine when a load ended; the request then waited for the next poll, or for ever."""
    write_adapter(tmp_path, "a")
    async with running(tmp_path) as r:
        load = asyncio.create_task(r.admin.load("a"))
        async with asyncio.timeout(PATIENCE):
            while r.registry.find("a") is None:
                await asyncio.sleep(0)
        result = await r.client.generate("hi", adapter="a", max_new_tokens=3)
        assert result.adapters[0].uid == (await load).uid
        await r.settle()


async def test_no_text_of_a_file_takes_the_list_away(tmp_path: Path) -> None:
    """A tensor's name may have lone surrogates, which no message can hold: one such file made every List fail."""
    async with running(tmp_path, read=lambda folder: refuse("\ud800x")) as r:
        write_adapter(tmp_path, "a")
        with pytest.raises(InvalidAdapter):
            await r.admin.load("a")
        assert [a.name for a in (await r.admin.list()).adapters] == ["a"]
        assert "\\ud800x: is no tensor" in (await r.admin.get("a")).error


def refuse(tensor: str) -> Any:
    raise InvalidAdapter(tensor, "is no tensor of LoRA", reason="UNSUPPORTED_ADAPTER")

"""Messages for an adapter are rendered with its own chat template where the operator wants that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from loramux.lora.folder import AdapterFolder

from tests.rpc.stack import ByteTokens, read_adapter, running, two_words, write_adapter

TURNS = [{"role": "user", "content": "Hi"}]
FILE = "chat_template.jinja"


class Templates(ByteTokens):
    """Remembers the templates that it was asked to render with."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []

    def encode_chat(self, messages: Any, *how: Any) -> list[int]:
        self.asked.append(how[1])
        return super().encode_chat(messages, *how)


def read(folder: AdapterFolder) -> Any:
    """As the reader does with --adapter-chat-templates."""
    loaded = read_adapter(folder)
    own = folder.path / FILE
    loaded.chat_template = own.read_text() if own.exists() else None
    return loaded


def folders(root: Path) -> None:
    for name in ("styled", "unread"):
        (write_adapter(root, name) / FILE).write_text(f"of {name}")
    write_adapter(root, "plain")


@pytest.mark.parametrize("used", [True, False])
async def test_an_adapters_own_template(tmp_path: Path, used: bool) -> None:
    """For one adapter, read already or not; never for the base, a mix, or where it is not wanted."""
    folders(tmp_path)
    tokens = Templates()
    async with running(
        tmp_path, script=two_words, read=read, tokens=tokens, scan_interval=0.0, adapter_chat_templates=used
    ) as r:
        await r.manager.load("styled")
        await r.manager.load("plain")
        requests: Sequence[dict[str, Any]] = (
            {"adapter": "styled"},
            {"adapter": "unread"},
            {"adapter": "plain"},
            {},
            {"mix": {"styled": 0.5, "plain": 0.5}},
        )
        for request in requests:
            await r.client.generate(messages=TURNS, max_new_tokens=1, **request)
        assert tokens.asked == (["of styled", "of unread"] if used else [None, None]) + [None] * 3


async def test_a_template_that_was_loaded_stays_with_its_version(tmp_path: Path) -> None:
    folders(tmp_path)
    tokens = Templates()
    async with running(tmp_path, script=two_words, read=read, tokens=tokens, adapter_chat_templates=True) as r:
        await r.manager.load("styled")
        (tmp_path / "styled" / FILE).write_text("another")
        await r.client.generate(messages=TURNS, adapter="styled", max_new_tokens=1)
        assert tokens.asked == ["of styled"]


async def test_an_adapter_that_cannot_be_read_fails_as_ever(tmp_path: Path) -> None:
    write_adapter(tmp_path, "gone")
    async with running(
        tmp_path, script=two_words, read=read, tokens=Templates(), scan_interval=0.0, adapter_chat_templates=True
    ) as r:
        entry = r.registry.get("gone")
        entry.source = str(tmp_path / "nowhere")
        assert await r.manager.chat_template(entry.uid) is None
        assert await r.manager.chat_template("no such version") is None

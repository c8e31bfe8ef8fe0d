"""Two adapters that answer differently are replaced for one another under streams: no answer mixes them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

import pytest
from loramux.answers import Started

from tests.server.stack import Stack, save_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")
STREAMS = 8
REPLACEMENTS = 30
MET = 2 * STREAMS  # streams that must have seen a replacement; how long that takes is the machine's affair


class Answer(NamedTuple):
    """What a stream said, by which adapter, and how many replacements had ended when it began and when it ended."""

    digest: str
    text: str
    began: int
    ended: int


async def test_no_answer_mixes_two_versions(stack: Stack, folders: tuple[Path, Path]) -> None:
    save_adapter(folders[1] / "left", rank=8, seed=500)
    save_adapter(folders[1] / "right", rank=16, seed=600)
    replaced = 0

    async def ask() -> Answer:
        began, text, digest = replaced, "", ""
        async for event in stack.client.stream("Hello", adapter="swapped", max_new_tokens=40, ignore_eos=True):
            if isinstance(event, Started):
                digest = event.adapters[0].digest
            text += event.text
        return Answer(digest, text, began, replaced)

    alone = {}
    for source in ("left", "right"):
        loaded = await stack.admin.load("swapped", source, replace=True)
        alone[loaded.digest] = (await ask()).text
    assert len(set(alone.values())) == 2
    baseline = stack.counts()
    answers: list[Answer] = []

    def enough() -> bool:
        met = sum(answer.ended > answer.began for answer in answers)
        return replaced >= REPLACEMENTS and met >= MET and {answer.digest for answer in answers} == alone.keys()

    async def stream() -> None:
        while not enough():
            answers.append(await ask())

    streams = [asyncio.create_task(stream()) for _ in range(STREAMS)]
    while not enough():
        await stack.admin.load("swapped", ("left", "right")[replaced % 2], replace=True)
        replaced += 1
        await asyncio.sleep(0.02)
    await asyncio.gather(*streams)

    assert [answer.text for answer in answers] == [alone[answer.digest] for answer in answers]
    await stack.settle({**baseline, "adapter_bytes": stack.counts()["adapter_bytes"]})
    await stack.admin.unload("swapped")

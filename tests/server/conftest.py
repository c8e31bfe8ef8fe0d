"""One server for each test module."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.server.stack import Stack, save_adapter, save_model, serving


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder, and an adapter root with a0 … a4 of different ranks."""
    root = tmp_path_factory.mktemp("served")
    for i, rank in enumerate((1, 3, 8, 16, 64)):
        save_adapter(root / "adapters" / f"a{i}", rank=rank, seed=i)
    return save_model(root / "model"), root / "adapters"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(folders: tuple[Path, Path]) -> AsyncIterator[Stack]:
    """Serves a0 … a4."""
    async with serving(*folders) as stack:
        for i in range(5):
            await stack.admin.load(f"a{i}")
        yield stack

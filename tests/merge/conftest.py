"""A Python that has imported what a merge needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.preloaded import preloaded


@pytest.fixture(scope="package")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """See `tests.preloaded`."""
    modules = "loramux.merge_worker", "loramux.merge", "transformers.models.llama.modeling_llama"
    with preloaded(tmp_path_factory.mktemp("python"), *modules) as command:
        yield command

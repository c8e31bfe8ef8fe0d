"""Imports during which nothing is collected."""

from __future__ import annotations

import gc

import pytest
from loramux.importing import heavy_imports


def test_what_is_imported_is_never_collected() -> None:
    with heavy_imports():
        assert not gc.isenabled()
        made: list[object] = []
        made.append(made)
    assert gc.isenabled()
    assert all(thing is not made for thing in gc.get_objects())


def test_after_an_import_that_fails_all_is_as_before() -> None:
    with pytest.raises(ImportError), heavy_imports():
        import loramux.nothing  # noqa: F401
    assert gc.isenabled()

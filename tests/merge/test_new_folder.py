"""A folder that appears complete or not at all, whatever is in the way."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Never

import pytest
from loramux.errors import InvalidRequest, Overloaded
from loramux.merge import Ingredient, merge
from loramux.model.tensor_file import TensorFile
from loramux.new_folder import new_folder

from tests.server.stack import save_adapter, save_model


def failing(code: int) -> Never:
    raise OSError(code, "as the disk says")


def test_what_is_no_leftover_of_ours_is_left_alone(tmp_path: Path) -> None:
    """Another writer may finish, and rename, between our seeing its folder and our looking at it: a dead link."""
    strange = [tmp_path / f".other.loramux-partial-{i}" for i in range(3)]
    strange[0].write_text("a file")
    strange[1].symlink_to(tmp_path / "nowhere")
    strange[2].mkdir()  # a killed writer's
    with new_folder(tmp_path / "new") as scratch:
        (scratch / "x").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [strange[0].name, strange[1].name, "new"]


def test_a_rename_that_fails_is_not_called_a_folder_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", lambda self, target: failing(errno.EIO))
    with pytest.raises(OSError, match="as the disk says"), new_folder(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="File name too long"), new_folder(tmp_path / ("n" * 300)):
        pytest.fail("nothing may be written for it")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "a")
    monkeypatch.setattr(TensorFile, "add", lambda self, name, tensor: failing(errno.ENOSPC))
    with pytest.raises(Overloaded, match="is full; free some of it") as caught:
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "out")
    assert (caught.value.reason, caught.value.retry_after) == ("DISK_FULL", None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]

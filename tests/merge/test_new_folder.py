"""A folder that appears complete or not at all, whatever is in the way."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Never

import loramux.merge
import loramux.quantize
import pytest
from loramux.cli import app
from loramux.errors import InvalidRequest, Overloaded
from loramux.merge import Ingredient, merge
from loramux.model.tensor_file import TensorFile
from loramux.new_folder import new_folder
from typer.testing import CliRunner

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


@pytest.mark.parametrize("name", ["a\nb", "a\n", "\x1b[2Jmodel", "a\u202eb", ".hidden", "-rf", "two words", "n" * 129])
def test_a_name_that_an_adapter_could_not_have_is_refused(tmp_path: Path, name: str) -> None:
    """It reached logs and terminals, and whoever lists the folder."""
    with pytest.raises(InvalidRequest, match="cannot be a new folder's name") as caught, new_folder(tmp_path / name):
        pytest.fail("nothing may be written for it")
    assert caught.value.message.isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["merge", "a", "--out"], ["quantize", "smollm2"]], ids=["merge", "quantize"])
def test_commands_refuse_such_a_name_before_the_work(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loramux.merge, loramux.quantize):
        monkeypatch.setattr(module, "open_source", lambda source: pytest.fail("nothing is read for it"))
    save_adapter(tmp_path / "adapters" / "a")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command, str(tmp_path / "new\nmodel")])
    assert isinstance(result.exception, InvalidRequest)
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "a")
    monkeypatch.setattr(TensorFile, "add", lambda self, name, tensor: failing(errno.ENOSPC))
    with pytest.raises(Overloaded, match="is full; free some of it") as caught:
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "out")
    assert (caught.value.reason, caught.value.retry_after) == ("DISK_FULL", None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]

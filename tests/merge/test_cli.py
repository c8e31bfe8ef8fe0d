"""`loramux merge`, as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from loramux.cli import app
from typer.testing import CliRunner

from tests.merge.recipes import batched, dense
from tests.server.stack import save_adapter, save_model


@pytest.mark.parametrize("mix", ["a=1,a=2", "a=nan", "a=inf", "=1", "a=1,", "a=x", "", "a", "a,b=1"])
def test_a_mix_that_means_nothing_is_refused(mix: str, tmp_path: Path) -> None:
    """Also the same name twice, of which only the last would count, and numbers that spoil every weight. A bare
    name weighed 1."""
    save_adapter(tmp_path / "adapters" / "a")
    command = ["merge", "--mix", mix, "--out", str(tmp_path / "out"), "--adapter-dir", str(tmp_path / "adapters")]
    result = CliRunner().invoke(app, [*command, "--model", str(save_model(tmp_path / "base"))])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_dora_by_itself(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapters" / "a", use_dora=True)
    base = save_model(tmp_path / "base")
    command = ["merge", "a", "--out", str(tmp_path / "out"), "--adapter-dir", str(tmp_path / "adapters")]
    result = CliRunner().invoke(app, [*command, "--model", str(base), "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    assert dense(tmp_path / "out")[1] == batched(base, {adapter: 1.0})[1]

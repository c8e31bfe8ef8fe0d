"""The checked-in stubs are those of the checked-in protos."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "proto/loramux/v1").glob("*.proto"))


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
def test_stubs_are_fresh(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"]
    command += [f"--{out}_out={tmp_path}" for out in ("python", "grpc_python", "pyi")]
    subprocess.run([*command, *map(str, PROTOS)], check=True, timeout=60)
    made = {path.name: path.read_text() for path in (tmp_path / "loramux/v1").iterdir()}
    there = {
        path.name: path.read_text()
        for path in (ROOT / "server/loramux/v1").iterdir()
        if path.suffix in (".py", ".pyi") and path.name != "__init__.py"
    }
    assert made.keys() == there.keys()
    for name in made:
        assert made[name] == there[name], f"{name} is stale: run `make stubs`"

"""What is declared in pyproject.toml and constraints.txt, what a client alone needs, and what a wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from loramux import cli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
DIRECT = [requirement for requirement in CLIENT + EXTRAS if requirement.name != PROJECT["name"]]
# What the machine with the GPU has.
GPU = {"torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0"}
PINS = {
    canonicalize_name(name): Version(version)
    for name, equals, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    if equals
}

# The command line, where none of the packages in argv[1] is installed.
WITHOUT = """
import runpy, sys
refused = set(sys.argv.pop(1).split(","))
class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse)
import loramux.client
runpy.run_module("loramux", run_name="__main__", alter_sys=True)
"""


def test_every_requirement_ends_where_it_was_tried() -> None:
    endless = [str(r) for r in DIRECT if not any(bound.operator in ("<", "<=") for bound in r.specifier)]
    assert not endless


def test_the_oldest_libraries_that_are_checked_are_the_oldest_supported() -> None:
    (line,) = re.findall(r"^OLDEST_LIBRARIES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lower = {r.name: bound.version for r in DIRECT for bound in r.specifier if bound.operator == ">="}
    names = ("torch", "transformers", "triton")
    assert line.split() == [f"{name}=={lower[name]}.*" for name in names]
    assert all(GPU[name].startswith(lower[name] + ".") for name in names)


def test_every_requirement_has_a_pin_within_its_bounds() -> None:
    beyond = [str(r) for r in DIRECT if PINS.get(canonicalize_name(r.name), Version("0")) not in r.specifier]
    beyond += [str(r) for r in DIRECT if r.name in GPU and GPU[r.name] not in r.specifier]
    assert not beyond


@pytest.fixture(scope="module")
def beyond() -> list[str]:
    """The top-level packages installed here that a client does not bring."""
    pytest.importorskip("torch")
    brought = {"loramux"}
    queue = list(CLIENT)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in brought and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            brought.add(name)
            queue += map(Requirement, metadata.requires(name) or ())
    packages = metadata.packages_distributions().items()
    return [package for package, names in packages if brought.isdisjoint(map(canonicalize_name, names))]


@pytest.mark.parametrize(
    ("command", "status", "shown"),
    [
        (["--help"], 0, "generate"),
        (["serve", "--help"], 0, "--adapter-dir"),
        (["generate", "Hello", "--target", "127.0.0.1:1"], 1, "UNAVAILABLE"),
        (["adapters", "list", "--admin", "127.0.0.1:1"], 1, "UNAVAILABLE"),
    ],
)
def test_a_client_needs_no_package_of_the_server(
    command: list[str], status: int, shown: str, beyond: list[str]
) -> None:
    assert {"torch", "transformers", "numpy", "yaml"} <= set(beyond)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(beyond), *command],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == status, done.stderr
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [["serve"], ["demo"], ["merge", "a", "--out", "b"], ["quantize", "a", "b"], ["plan", "a", "--gpu-memory", "1GiB"]],
    ids=" ".join,
)
def test_a_server_that_is_not_installed_is_one_sentence(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*PROJECT["dependencies"], 'nobody-has-this<2,>=1; extra == "server"', 'nor-this; extra == "train"']
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    monkeypatch.setattr(sys, "argv", ["loramux", *command])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "error: this command needs the server, and nobody-has-this is not installed: pip install 'loramux[server]'\n"
    )


def test_a_wheel_has_everything(tmp_path: Path) -> None:
    """The native sources, the stubs' types and py.typed too: all files of the package but what Python makes itself."""
    source = tmp_path / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so*")
    shutil.copytree(ROOT / "server", source / "server", ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("loramux/")}
    server = source / "server"
    assert held == {str(path.relative_to(server)) for path in (server / "loramux").rglob("*") if path.is_file()}
    assert {"loramux/py.typed", "loramux/ops/cpu/linear.h", "loramux/v1/generation_pb2.pyi"} <= held

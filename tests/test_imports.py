"""Imports run one way, and policy is free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "server" / "loramux"
ROOMS = {
    "ops": {"ops"},
    "model": {"model", "ops"},
    "lora": {"lora", "ops"},
    "engine": {"engine", "lora", "model", "ops"},
    "http": {"http", "engine", "lora"},
    "rpc": {"rpc", "http", "engine", "lora"},
}
EVERYONE = {
    "cache",
    "children",
    "errors",
    "escaping",
    "files",
    "logs",
    "config",
    "values",
    "metrics",
    "v1",
    "merge_report",
    "__init__",
    "__version__",
}
TORCH_FREE = [
    "loramux.client",
    "loramux.config",
    "loramux.errors",
    "loramux.logs",
    "loramux.metrics",
    "loramux.cli",
    "loramux.checks",
    "loramux.serve",
    "loramux.model.place",
    "loramux.engine.request",
    "loramux.engine.kv_cache",
    "loramux.engine.scheduler",
    "loramux.engine.client",
    "loramux.engine.door",
    "loramux.lora.registry",
    "loramux.lora.manager",
    "loramux.lora.roots",
    *(f"loramux.rpc.{path.stem}" for path in sorted((PACKAGE / "rpc").glob("*.py")) if path.stem != "__init__"),
]


def imported(path: Path) -> set[str]:
    """Rooms and modules of loramux that a file imports anywhere, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] if node.module != "loramux" else [f"loramux.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("loramux.")}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    for path in sorted((PACKAGE / room).rglob("*.py")):
        beyond = imported(path) - ROOMS[room] - EVERYONE
        assert not beyond, f"{path.relative_to(PACKAGE)} imports {sorted(beyond)}"


def test_loadtest_knows_only_the_client() -> None:
    allowed = {"client", "answers", "errors", "terminal", "v1"}
    for path in sorted((PACKAGE.parent.parent / "loadtest").rglob("*.py")):
        beyond = imported(path) - allowed
        if "peers" in path.parts or path.stem == "shapes":
            beyond -= {"model"}  # the peer loads the same base; the shapes of the default come from it
        if path.stem == "kernels":
            beyond -= {"ops"}  # it measures them
        if path.parent.name == "gpu" and path.stem != "served":
            beyond -= {"lora", "model", "ops"}  # they measure the model itself, and no server
        assert not beyond, f"{path.name} imports {sorted(beyond)}"


def test_policy_and_faces_never_import_torch() -> None:
    code = "import sys\nfor name in sys.argv[1:]:\n    __import__(name)\n    assert 'torch' not in sys.modules, name"
    done = subprocess.run([sys.executable, "-c", code, *TORCH_FREE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_module_can_be_imported() -> None:
    """Names that a library got or lost between the versions that are supported: `make check-oldest` has the oldest."""
    pytest.importorskip("torch")
    code = """
import importlib, pkgutil, loadtest, loramux
for package in (loramux, loadtest):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"loramux.ops.cuda.linear", "loramux.model.weights", "loadtest.gpu.steps"} <= set(done.stdout.split())

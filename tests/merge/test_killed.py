"""A merge that is killed half-way leaves nothing that looks finished, and the next one clears what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from loramux.merge import Ingredient, merge
from transformers import AutoModelForCausalLM

from tests.server.stack import save_adapter, save_model

# Says who it is when it is half-way, and waits there until it is told to go on.
HELD = """
import os, sys
from pathlib import Path
from loramux.merge import Ingredient, merge

def hold(done, total):
    if done == total * int(sys.argv[4]) // 2:
        print(os.getpid(), flush=True)
        sys.stdin.readline()

merge(sys.argv[1], [Ingredient("a", Path(sys.argv[2]))], Path(sys.argv[3]), progress=hold)
"""


# Is told to end in the middle, and again when it has begun to clear away: a drain and a client that goes do that.
TOLD_TWICE = """
import os, shutil, signal
from loramux import new_folder
from loramux.merge_worker import main

remove = shutil.rmtree

def rmtree(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    remove(*args, **options)

def hold(done, total):
    if done == total // 2:
        new_folder.shutil.rmtree = rmtree
        os.kill(os.getpid(), signal.SIGTERM)

main(hold)
"""


def test_a_worker_that_is_told_to_end_twice_leaves_nothing(python: tuple[str, ...], tmp_path: Path) -> None:
    base, adapter, out = save_model(tmp_path / "base"), save_adapter(tmp_path / "a"), tmp_path / "out" / "merged"
    out.parent.mkdir()
    job = {
        "model": str(base),
        "parts": [["a", str(adapter), [str(tmp_path)], 1.0, ""]],
        "out": str(out),
        "dtype": "bf16",
    }
    script = tmp_path / "told_twice.py"
    script.write_text(TOLD_TWICE)
    done = subprocess.run([*python, str(script)], input=json.dumps(job), capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("halves", [1, 2], ids=["half-way", "after the last tensor"])
def test_sigkill_leaves_nothing_that_looks_finished(halves: int, python: tuple[str, ...], tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "a")
    out = tmp_path / "out" / "merged"
    out.parent.mkdir()
    script = tmp_path / "held.py"
    script.write_text(HELD)
    command = [*python, str(script), str(base), str(adapter), str(out), str(halves)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        try:
            (scratch,) = out.parent.iterdir()
            # Another merge into the same place must not take it for a leftover while it runs.
            merge(str(base), [Ingredient("a", adapter)], out.parent / "other")
            assert scratch.is_dir()
        finally:
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert {p.name for p in out.parent.iterdir()} == {scratch.name, "other"}
    assert scratch.name.startswith(".")
    assert not (scratch / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(scratch)
    merge(str(base), [Ingredient("a", adapter)], out)
    assert {p.name for p in out.parent.iterdir()} == {"merged", "other"}
    AutoModelForCausalLM.from_pretrained(out)

"""`python -m loadtest` as people and scripts run it: exit status, one line of JSON, sentences for errors."""

from __future__ import annotations

import ast
import asyncio
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import loadtest
from loadtest.cli import main
from tests.loadtest.fakes import Behaviour, serving

ROOT = Path(loadtest.__file__).parent


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        (line,) = self.out.splitlines()  # one line, and nothing else: `| jq` and `| tail -1` work
        return json.loads(line)


async def run(*arguments: str) -> Ended:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loadtest",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT.parent,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def test_make_load_and_run(tmp_path: Path) -> None:
    made = await run("adapters", "--out", str(tmp_path), "--count", "3", "--rank", "2", "--targets", "k_proj")
    assert made.status == 0, made.err
    assert made.json["adapters"] == 3
    async with serving(Behaviour(between=0.001)) as at:
        ports = ["--target", at.address, "--admin", at.address]
        report = tmp_path / "report.json"
        ended = await run(
            "run", *ports, "--load-dir", str(tmp_path), "--num-prompts", "6", "--output-len", "4", "--json", str(report)
        )
        assert ended.status == 0, ended.err
        assert at.fake.loaded.keys() == {"a-000", "a-001", "a-002"}
    assert (ended.json["completed"], ended.json["failed"], ended.json["distinct_adapters"]) == (6, 0, 3)
    assert json.loads(report.read_text()) == ended.json
    assert "output tokens" in ended.err


async def test_failures_end_with_1_unless_allowed() -> None:
    """A benchmark in CI that ends with 0 while requests fail is a benchmark of refusals."""
    async with serving(Behaviour(fail_adapter="bad")) as at:
        at.fake.loaded = {"bad": "uid"}
        arguments = ["run", "--target", at.address, "--admin", at.address, "--adapter-names", "bad,"]
        arguments += ["--num-prompts", "2", "--warmup", "0"]
        strict, lenient = await asyncio.gather(run(*arguments), run(*arguments, "--allow-failures"))
    assert (strict.status, lenient.status) == (1, 0)
    assert strict.json["errors"] == {"RESOURCE_EXHAUSTED": 2}


async def test_too_few_adapters_is_a_sentence() -> None:
    async with serving(Behaviour()) as at:
        ended = await run("run", "--target", at.address, "--admin", at.address, "--adapters", "2")
    assert ended.status == 2
    assert "2 adapters are asked for, but the server has 0" in ended.err
    assert "Traceback" not in ended.err


async def test_no_server_is_a_sentence() -> None:
    ended = await run("run", "--target", "127.0.0.1:1", "--admin", "127.0.0.1:1")
    assert ended.status == 2
    assert "no server answers at 127.0.0.1:1" in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run --concurrency 2 --request-rate 3", "not both"),
        ("adapters --out /nowhere --model no-such-model", "'no-such-model'"),
        ("adapters --out /nowhere --rank 16,x", "a rank is a whole number"),
        ("adapters --out /nowhere --targets w_proj", "'w_proj'"),
        ("bench-adapters --distinct 10", "--distinct takes a multiple of 4"),
        ("soak --seed-leak", "--seed-leak needs --serve"),
        ("soak", "give --serve, or --adapter-dir"),
        ("peers peft --adapter-dir /nowhere", "no adapters under /nowhere"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loadtest", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert sentence in " ".join(shown.err.replace("│", " ").split())
    assert shown.out == ""


async def test_a_soak_of_a_server_elsewhere(tmp_path: Path) -> None:
    async with serving(Behaviour(first_token=0.01)) as at:
        where = ["--target", at.address, "--admin", at.address, "--metrics", at.metrics]
        short = ["--cycles", "20", "--adapter-dir", str(tmp_path)]
        ended = await run("soak", *where, *short)
        assert at.fake.loads == 20 + 2 + 3  # cycles, replacements, residents
    assert ended.status == 1  # 20 cycles are too few to judge memory, and that is no pass
    assert ended.json["failed"] == 0
    assert [problem for problem in ended.json["problems"] if "memory was not judged" not in problem] == []


async def test_help_is_quick_and_needs_no_torch() -> None:
    """`--help` that imports torch takes seconds; and a driver on another machine needs none."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import sys, loadtest.cli; print(sorted({'torch', 'peft', 'transformers'} & sys.modules.keys()))",
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT.parent,
    )
    out, _ = await process.communicate()
    assert out.decode().strip() == "[]"


def test_only_the_client_and_the_errors_are_imported() -> None:
    """A load test that reaches into the server measures something else than its users see."""
    allowed = {"loramux.client", "loramux.errors", "loramux.terminal", "loramux.v1"}
    peers = {"loramux.model.loading"}
    for file in ROOT.rglob("*.py"):
        # These measure the operations themselves, and no server.
        if file.stem == "kernels" or (file.parent.name == "gpu" and file.stem != "served"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loramux"):
                assert node.module in (allowed | peers if "peers" in file.parts else allowed), file
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("loramux") for alias in node.names), file

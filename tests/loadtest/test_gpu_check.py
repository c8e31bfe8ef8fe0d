"""`make gpu-check` as far as a CPU allows: parts on tiny shapes, what becomes of parts that fail, and the document."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from loramux.ops.nf4 import NF4Weight

from loadtest.cli import main
from loadtest.commands import gpu_check
from loadtest.commands.gpu_check import run_part
from loadtest.gpu import machine, pytests, report
from loadtest.gpu.models import random_adapter, random_model
from loadtest.gpu.parts import FIRST, PARTS, ROOT, SECOND, Part, processes
from loadtest.gpu.peers import TITLES, peers
from loadtest.gpu.report import Job, read, render, update
from loadtest.gpu.scale import DRY
from loadtest.gpu.served import served
from loadtest.gpu.steps import StepBench, profile, steps
from tests.patience import PATIENCE

BATCHES = ("base", "one, r=2", "one each, r=2")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """With a machine whose copy is known."""
    job = Job(DRY, tmp_path / "rows.jsonl", "run", "table", 60)
    job.file.write_text(json.dumps({"run": "run", "table": "machine", "row": {"GB/s": 10.0}}) + "\n")
    return job


def found(job: Job, what: str = "row") -> list[Any]:
    return [line[what] for line in read(job.file) if line["table"] == "table" and what in line]


def rows_of(part: Callable[[Job], None], job: Job) -> list[dict[str, Any]]:
    part(job)
    assert found(job, "problem") == []
    return found(job)


def test_steps_are_measured_beside_their_floor(job: Job) -> None:
    rows = rows_of(steps, job)
    assert [(row["rows"], row["adapters"]) for row in rows] == [(1, name) for name in BATCHES]
    assert all(min(row["forward"], row["clock"], row["floor"]) > 0 for row in rows)
    assert rows[2]["floor"] > rows[0]["floor"]
    assert [("tax" in row, row["replay"]) for row in rows] == [(False, None), (True, None), (True, None)]


def test_the_replay_is_timed_alone_and_its_absence_a_problem(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, replays = StepBench(job, (1,)), []
    recorder, forward, inputs = SimpleNamespace(last=print), bench.model.forward, bench.decode(1, [])
    bench._recorder = recorder  # type: ignore[assignment]
    with pytest.raises(ValueError, match="launched one by one"):
        bench.measure(inputs)

    def replayed(inputs: Any) -> torch.Tensor:
        recorder.last = lambda: replays.append(1)
        return forward(inputs)

    monkeypatch.setattr(bench.model, "forward", replayed)
    assert all(bench.measure(inputs).values())
    assert replays


def test_a_step_computes_with_its_adapters(job: Job) -> None:
    """What is timed is one token of each sequence, in the company of its own context, with its own adapter."""
    bench = StepBench(job, (2,))
    model = bench.model
    adapters = [random_adapter(model, 2) for _ in range(2)]
    base, first, each = (model.forward(bench.decode(2, a)).float() for a in ([], adapters[:1], adapters))
    assert torch.isfinite(base).all()
    assert not torch.equal(first, base)
    torch.testing.assert_close(each[0], first[0], rtol=2e-2, atol=2e-2)
    assert not torch.allclose(each[1], first[1], rtol=2e-2, atol=2e-2)
    # Another token before the last one changes the answer: attention reads what prefill has written.
    bench.tokens[0][3] ^= 1
    bench.prefill()
    assert not torch.equal(model.forward(bench.decode(2, [])).float()[0], base[0])


def test_an_adapter_lies_as_its_offsets_say(job: Job) -> None:
    adapter = random_adapter(StepBench(job, (1,)).model, 3)
    assert adapter.max_rank == 3
    for site, weights in adapter.items():
        a, b, *_ = adapter.offsets[site].tolist()
        assert weights.a.data_ptr() == adapter.buffer[a:].data_ptr()
        assert weights.b.data_ptr() == adapter.buffer[b:].data_ptr()
        assert weights.a.any()
        assert weights.b.any()


def test_the_profile_says_where_a_step_goes(job: Job) -> None:
    rows = rows_of(profile, job)
    assert {row["adapters"] for row in rows} == {"base", "one each"}
    assert any(row["kernel"] == "loramux_cpu::linear" and row["times"] >= 1 for row in rows)
    assert sum(float(row["share"].rstrip("%")) for row in rows if row["adapters"] == "base") > 90


def test_random_weights_keep_the_size_of_what_goes_through() -> None:
    layer = random_model(DRY.model, "cpu").model.layers[0].mlp.gate_proj.weight
    weight = NF4Weight.quantize(layer).dequantize(torch.float32)
    x = torch.randn(64, layer.shape[1])
    assert (x @ weight.T).std() / x.std() == pytest.approx(1, rel=0.1)


def test_operations_are_measured_beside_their_peers(job: Job) -> None:
    rows = rows_of(machine.gemm, job)
    assert len(rows) == 4 * len(DRY.gemm_rows) * 3
    assert [row["by"] for row in rows[:3]] == ["loramux", "bitsandbytes", "dense bf16"]
    assert all(min(row["µs"], row["× loramux"], row["floor"]) > 0 for row in rows)


def test_bitsandbytes_gets_the_same_product_to_do() -> None:
    weights = [NF4Weight.quantize(torch.randn(n, 64)) for n in (32, 16)]
    x = torch.randn(3, 64).to(torch.bfloat16)
    for weight, product in zip(weights, machine.bitsandbytes_product(x, weights), strict=True):
        expected = x.float() @ weight.dequantize(torch.float32).T
        torch.testing.assert_close(product.float(), expected, rtol=5e-2, atol=0.2)


@pytest.mark.filterwarnings("ignore")
def test_peers_are_measured(job: Job) -> None:
    rows = rows_of(peers, job)
    expected = [(who, n, name) for who in TITLES.values() for name in BATCHES for n in DRY.all_rows]
    assert [(row["what"], row["rows"], row["adapters"]) for row in rows] == expected
    assert all(isinstance(row["forward"], float) for row in rows)


def test_a_real_server_answers_in_a_batch_as_alone(job: Job) -> None:
    answers, rate, start = rows_of(served, job)
    assert answers["what"] == "loramux serve --batch-invariant"
    assert (answers["measured"], answers["found"]) == ("answers as alone", "16 of 16")
    assert rate["measured"] == "serve_c4_a2, output tokens/s"
    assert rate["found"] > 0
    assert start["measured"] == "start, s"


def test_what_fails_is_told_and_the_rest_goes_on(job: Job) -> None:
    with job.row(rows=1, by="us") as row:
        row["first"] = 2.5
        row["second"] = 1 / 0
    assert found(job) == [{"rows": 1, "by": "us", "first": 2.5}]
    assert found(job, "problem") == ["rows 1, by us: ZeroDivisionError: division by zero"]


def test_what_breaks_the_device_ends_its_part(job: Job) -> None:
    with job.row(rows=1):
        raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="illegal"), job.row(rows=2):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert len(found(job, "problem")) == 2
    assert found(job) == [{"rows": 1}, {"rows": 2}]


def child(job: Job, code: str, seconds: float = PATIENCE) -> list[dict[str, Any]]:
    """What a part with this code has told."""
    head = (
        "from loadtest.gpu.report import Job; from pathlib import Path; import os, sys, time, signal, subprocess\n"
        f"job = Job(None, Path({str(job.file)!r}), 'run', 'table', 60)\n"
    )
    limited = Job(DRY, job.file, job.run, job.table, seconds)
    return run_part([sys.executable, "-c", head + code], limited, job.file.with_name("log"))


def test_a_part_that_crashes_keeps_what_it_had(job: Job) -> None:
    told = child(job, "job.tell(row={'x': 1}); print('cell 7', flush=True); os.kill(os.getpid(), signal.SIGSEGV)")
    assert [line.keys() - {"run", "table"} for line in told] == [{"row"}, {"problem"}]
    assert found(job) == [{"x": 1}]
    assert found(job, "problem") == ["ended with status -11: cell 7"]


def test_a_part_that_raises_shows_the_last_line(job: Job) -> None:
    child(job, "raise RuntimeError('an illegal memory access was encountered')")
    assert found(job, "problem") == ["ended with status 1: RuntimeError: an illegal memory access was encountered"]


def test_a_part_that_overruns_its_limit_is_killed_with_its_servers(job: Job) -> None:
    code = (
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "job.tell(row={'pid': p.pid}); job.file.open('a').write('{\"row\": {\"cut o')\n"
        "time.sleep(600)"
    )
    child(job, code, 5.0)
    (row,) = found(job)
    assert "not done after 5 s and killed" in found(job, "problem")[0], "the line after the one cut off is whole"
    deadline = time.monotonic() + PATIENCE
    with suppress(psutil.NoSuchProcess):  # gone, or dead and waited for by nobody
        while psutil.Process(row["pid"]).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            assert time.monotonic() < deadline, "it outlived what was killed"
            time.sleep(0.05)


RUN_FILE = """
import pathlib, sys
from dataclasses import replace
from loadtest.gpu import pytests
from loadtest.gpu.report import Job
from loadtest.gpu.scale import DRY
scale = replace(DRY, device="cuda" if sys.argv[3] == "all" else "cpu")
pytests.run_file(Job(scale, pathlib.Path(sys.argv[1]), "run", "table", float(sys.argv[4])), sys.argv[2])
"""


@pytest.fixture
def run_file(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[list[int]]]:
    """Runs a file of tests as a part does, and returns the outcomes of each process that it took."""
    for name in ("PYTEST_CURRENT_TEST", pytests.SKIP):
        monkeypatch.delenv(name, raising=False)

    def run(code: str, tests: str = "all", seconds: float = PATIENCE) -> list[list[int]]:
        (tmp_path / "test_it.py").write_text(code)
        command = [sys.executable, "-c", RUN_FILE, str(job.file), str(tmp_path / "test_it.py"), tests, str(seconds)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        return [[row[n] for n in ("passed", "failed", "skipped", "not run")] for row in found(job)]

    return run


LOST = "import pytest, torch\ndef test_lost(): raise torch.AcceleratorError('CUDA error: misaligned address')\n"


def test_after_a_broken_device_the_rest_of_a_file_runs_in_a_new_process(job: Job, run_file: Any) -> None:
    before, after = "def test_before(): assert 3 == 4\n", "def test_after(): pass\ndef test_skipped(): pytest.skip()\n"
    assert run_file(before + LOST + after) == [[0, 2, 0, 2], [1, 0, 1, 0]]
    failed, lost = found(job, "problem")
    assert "::test_before: AssertionError: assert 3 == 4" in failed
    assert "::test_lost: torch.AcceleratorError: CUDA error: misaligned address" in lost


def test_a_second_loss_goes_on_behind_it(run_file: Any) -> None:
    again = LOST.replace("test_lost", "test_again")
    assert run_file(LOST + again + "def test_after(): pass\n") == [[0, 1, 0, 2], [0, 1, 0, 1], [1, 0, 0, 0]]


def test_tests_for_which_there_is_no_time_are_a_problem(job: Job, run_file: Any) -> None:
    assert run_file("def test_a(): pass\ndef test_b(): pass\n", seconds=1e-3) == [[1, 0, 0, 1]]
    assert found(job, "problem")[0].endswith("pytest ended with TESTS_FAILED, 1 tests were not run")


def test_a_dry_run_takes_one_test_of_a_file(run_file: Any) -> None:
    assert run_file("def test_a(): assert False\ndef test_b(): pass\n", "one") == [[1, 0, 0, 0]]


def test_a_test_that_kills_its_process_is_named(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("import os, signal\ndef test_a(): pass\ndef test_b(): os.kill(os.getpid(), signal.SIGSEGV)\n")
    command = [sys.executable, "-c", RUN_FILE, str(job.file), str(file), "all", "60"]
    run_part(command, Job(DRY, job.file, job.run, job.table, PATIENCE), tmp_path / "log")
    assert found(job, "problem")[0].startswith("ended with status -11: ")
    assert found(job, "problem")[0].endswith("::test_b")


def test_a_file_that_cannot_be_imported_is_a_problem(job: Job, run_file: Any) -> None:
    assert run_file("import nothing_of_that_name") == [[0, 0, 0, 0]]
    why, none = found(job, "problem")
    assert "ModuleNotFoundError: No module named 'nothing_of_that_name'" in why
    assert none.endswith("pytest ended with INTERRUPTED, 0 tests were not run")


def test_the_document_has_the_last_run_of_each_table_and_device(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    for run, device, of in (("1", "H100", "old"), ("2", "A100", "other"), ("3", "H100", "new")):
        Job(DRY, file, run, "machine", 1).tell(row={"device": device, "driver": "580"})
        if run != "3":
            Job(DRY, file, run, "tests", 1).tell(note=f"tests of run {run}")
        Job(DRY, file, run, "steps", 1).tell(row={"a": 1.23456, "b": None, "c": of})
    Job(DRY, file, "3", "steps", 1).tell(row={"a": 1234.5, "c": "x|<y>"})
    Job(DRY, file, "3", "steps", 1).tell(problem="broke\nbadly")
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{report.BEGIN}{report.END}\nafter\n")
    for _ in range(2):
        update(page, render(read(file)))
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}### ")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "tests of run 1" in text
    assert "| old |" not in text
    assert text.count("### steps: ") == 2
    section = text.split("### steps: H100")[1]
    assert "3, driver 580, torch ?, triton ?, transformers ?, bitsandbytes ?" in section
    assert "- **failed**: broke badly\n\n| a | b | c |\n| --- | --- | --- |\n| 1.23 | – | new |\n" in section
    assert "| 1,234 | – | x\\|&lt;y> |" in section
    page.write_text("no markers")
    with pytest.raises(ValueError, match="no lines"):
        update(page, "")
    assert report.BEGIN in gpu_check.DOCUMENT.read_text()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["loadtest", "gpu-check", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_without_a_device_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(monkeypatch, "--out", str(tmp_path / "out")) == 2
    shown = capsys.readouterr()
    assert "sees no CUDA device" in shown.err
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


def test_unknown_parts_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--dry-run", "--parts", "steps,speed") == 2
    assert "not speed" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_presets_are_parts() -> None:
    assert set(FIRST) | set(SECOND) == set(PARTS)
    files = [file for name in ("smoke", "tests") for _, file in processes(name)]
    assert len(files) == len(set(files)) > 3
    assert all((ROOT / file).is_file() for file in files)


def test_a_dry_run_leaves_its_files_whatever_becomes_of_a_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One real part, by the command line; one that crashes; one that is too late. The document is there after each."""
    written: list[list[str]] = []

    def watched(command: list[str], job: Job, log: Path) -> list[dict[str, Any]]:
        if job.table != "machine":
            written.append([line["table"] for line in read(job.file) if "row" in line])
            assert all(f"### {table}" in (tmp_path / "out" / "gpu.md").read_text() for table in written[-1])
        crash = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
        patient = Job(job.scale, job.file, job.run, job.table, PATIENCE)
        return run_part(crash if "steps" in command else command, patient, log)

    monkeypatch.setattr(gpu_check, "run_part", watched)
    monkeypatch.setitem(PARTS, "gemm", Part("gemm", "machine:gemm", 0.5))
    monkeypatch.setenv("GPU_CHECK_OUT", str(tmp_path / "out"))
    assert command(monkeypatch, "--dry-run", "--parts", "machine,steps,gemm", "--commit", "abc123") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["verdict"] == "fail"
    assert "device: CPU" in " ".join(shown.err.split())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["gpu.md", "log", "rows.jsonl"]
    assert written == [["machine"]]
    told = read(tmp_path / "out" / "rows.jsonl")
    assert {line["run"].partition(", ")[2] for line in told} == {"loramux abc123"}
    assert told[0]["row"]["torch"] == torch.__version__
    assert [line["problem"][:25] for line in told if "problem" in line] == [
        "ended with status -11: " + sys.executable[:2],
        "gemm: no time was left",
    ]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "loramux abc123" in text
    assert "no time was left" in text

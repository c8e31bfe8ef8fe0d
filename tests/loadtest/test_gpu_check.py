"""`make gpu-check` as far as a CPU allows: parts on tiny shapes, what becomes of parts that fail, and the document."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from loramux.ops.nf4 import NF4Weight

from loadtest.cli import main
from loadtest.commands import gpu_check
from loadtest.gpu import gemm, parts, pytests, report
from loadtest.gpu.parts import FIRST, PARTS, SECOND, Part, run_part
from loadtest.gpu.peers import peers
from loadtest.gpu.pytests import Watch
from loadtest.gpu.random_model import RandomAdapters, RandomNF4
from loadtest.gpu.report import Findings, Job, OutOfTime, Report, read, render, update
from loadtest.gpu.scale import DRY
from loadtest.gpu.served import served
from loadtest.gpu.steps import StepBench, profile, steps
from tests.patience import PATIENCE

CPU = torch.device("cpu")
PAGE = f"before\n{report.BEGIN}\n{report.NOTHING}{report.END}\nafter\n"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(DRY, Report(tmp_path / "rows.jsonl", "run", "table"), time.monotonic() + 60, bandwidth=1e10)


def findings(file: Path) -> Findings:
    (run,) = read(file)
    return run.tables["table"]


def done(part: Callable[[Job], None], job: Job) -> Findings:
    part(job)
    return findings(job.report.file)


def test_steps_are_measured_beside_their_floor(job: Job) -> None:
    found = done(steps, job)
    assert not found.problems
    (row,) = found.rows
    assert row["rows"] == 1
    for kind in ("base", "1 adapter", "one each, r=2"):
        assert min(row[kind], row[f"{kind}, forward"], row[f"{kind}, clock"], row[f"{kind}, floor"]) > 0
    assert row["graphs"] == 0
    assert {"tax, 1 adapter", "tax, one each"} <= row.keys()
    assert row["one each, r=2, floor"] > row["base, floor"]


def test_steps_without_graphs_on_a_gpu_are_a_problem(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = StepBench(job, (1,))
    monkeypatch.setattr(bench, "model", SimpleNamespace(graphs=None, device=torch.device("cuda")))
    monkeypatch.setattr(bench, "_bytes", lambda *_: 1)
    monkeypatch.setattr(
        bench, "_step", lambda *_: SimpleNamespace(best=1.0, device_ms=1.0, wall_ms=1.0, replay_ms=None)
    )
    bench._cell({}, 1, "base", [])
    assert findings(job.report.file).problems == ["1 rows, base: launched one by one, 0 graphs"]


def test_a_step_computes_with_its_adapters(job: Job) -> None:
    """What is timed is one token of each sequence, in the company of its own context, with its own adapter."""
    bench = StepBench(job, (2,))
    model = bench.model
    adapters = RandomAdapters(model, [2], 2).adapters
    base, first, each = (model.forward(bench.decode(2, a)).float() for a in ([], adapters[:1], adapters))
    assert torch.isfinite(base).all()
    assert not torch.equal(first, base)
    torch.testing.assert_close(each[0], first[0], rtol=2e-2, atol=2e-2)
    assert not torch.allclose(each[1], first[1], rtol=2e-2, atol=2e-2)
    # Another token before the last one changes the answer: attention reads what prefill has written.
    bench.tokens[0][3] ^= 1
    bench.prefill()
    assert not torch.equal(model.forward(bench.decode(2, [])).float()[0], base[0])


def test_adapters_lie_beside_each_other(job: Job) -> None:
    model = StepBench(job, (1,)).model
    adapters = RandomAdapters(model, [1, 3], 3).adapters
    assert [adapter.max_rank for adapter in adapters] == [1, 3, 1]
    bounds = [(a.buffer.data_ptr(), a.buffer.data_ptr() + a.buffer.nbytes) for a in adapters]
    assert all(end == begin for (_, end), (begin, _) in pairwise(bounds))
    assert all(begin % 64 == 0 for begin, _ in bounds)
    for adapter in adapters:
        for site, weights in adapter.items():
            a, b, *_ = adapter.offsets[site].tolist()
            assert weights.a.data_ptr() == adapter.buffer[a:].data_ptr()
            assert weights.b.data_ptr() == adapter.buffer[b:].data_ptr()
            assert weights.a.any()
            assert weights.b.any()


def test_the_profile_says_where_a_step_goes(job: Job) -> None:
    found = done(profile, job)
    assert not found.problems
    assert {row["adapters"] for row in found.rows} == {"base", "one each"}
    assert any(row["kernel"] == "loramux_cpu::linear" and row["times"] >= 1 for row in found.rows)
    assert sum(float(row["share"].rstrip("%")) for row in found.rows if row["adapters"] == "base") > 90


def test_random_weights_keep_the_size_of_what_goes_through() -> None:
    weight = RandomNF4(CPU).weight(256, 512, gain=0.5)
    stored = weight.to_checkpoint("w")
    codes = stored.pop("w")
    again = NF4Weight.from_checkpoint(codes, {name.removeprefix("w."): value for name, value in stored.items()})
    dense = weight.dequantize(torch.float32)
    torch.testing.assert_close(again.dequantize(torch.float32), dense, rtol=0, atol=0)
    x = torch.randn(64, 512)
    assert (x @ dense.T).std() / x.std() == pytest.approx(0.5, rel=0.1)


def test_operations_are_measured_beside_their_peers(job: Job) -> None:
    found = done(gemm.gemm, job)
    assert not found.problems
    assert len(found.rows) == 4 * len(DRY.gemm_rows)
    for row in found.rows:
        assert min(row["loramux"], row["bitsandbytes"], row["dense bf16"], row["× bitsandbytes"], row["floor"]) > 0
        assert 0 < row["error"] < gemm.MOST_ERROR


def test_a_wrong_product_is_a_problem(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "error", lambda *_: float("nan"))
    assert "q/k/v, 1 rows: wrong, error nan" in done(gemm.gemm, job).problems


@pytest.mark.filterwarnings("ignore")
def test_peers_are_measured(job: Job) -> None:
    found = done(peers, job)
    assert not found.problems
    assert [(row["what"].split()[0], row["rows"]) for row in found.rows] == [
        (who, rows) for who in ("bitsandbytes", "dense") for rows in DRY.all_rows
    ]
    assert all(isinstance(row[kind], float) for row in found.rows for kind in ("base", "1 adapter", "one each, r=2"))


def test_a_real_server_answers_in_a_batch_as_alone(job: Job) -> None:
    found = done(served, job)
    assert not found.problems
    (row,) = found.rows
    assert row["served"] == "tiny --batch-invariant"
    assert row["answers as alone"] == "16 of 16"
    assert all(row[name] > 0 for name in ("1 requests, base", "4 requests, base", "4 requests, 2 adapters"))


def test_what_fails_is_told_and_the_rest_goes_on(job: Job) -> None:
    with job.report.filling(rows=1) as row:
        row["first"] = job.attempt("a cell", lambda: 1 / 0)
        row["second"] = job.attempt("another", lambda: 2.5)
    found = findings(job.report.file)
    assert found.rows == [{"rows": 1, "first": None, "second": 2.5}]
    assert found.problems == ["a cell: ZeroDivisionError: division by zero"]


def test_what_breaks_the_device_ends_its_part(job: Job) -> None:
    def fail(text: str) -> None:
        raise type("AcceleratorError", (RuntimeError,), {})(text)

    assert job.attempt("a graph", lambda: fail("operation not permitted when stream is capturing")) is None
    with pytest.raises(RuntimeError, match="illegal"):
        job.attempt("a kernel", lambda: fail("an illegal memory access was encountered"))
    assert len(findings(job.report.file).problems) == 2


def test_without_time_nothing_begins(tmp_path: Path) -> None:
    job = Job(DRY, Report(tmp_path / "rows", "run", "table"), time.monotonic())
    with pytest.raises(OutOfTime):
        job.attempt("a server", lambda: pytest.fail("it began"))
    late = Job(DRY, job.report, time.monotonic() + 60)
    with pytest.raises(OutOfTime):  # and that is no failure of what it began within
        late.attempt("a server", lambda: job.attempt("a rate", lambda: 1.0))
    assert not any(run.tables for run in read(job.report.file))


def child(tmp_path: Path, code: str, seconds: float) -> tuple[Findings, list[dict[str, Any]]]:
    written, shown = Report(tmp_path / "rows", "run", "table"), []
    head = (
        "from loadtest.gpu.report import Report; from pathlib import Path; import os, sys, time, signal, subprocess\n"
    )
    head += f"r = Report(Path({str(written.file)!r}), 'run', 'table')\n"
    assert not run_part([sys.executable, "-c", head + code], written, tmp_path / "log", seconds, shown.append)
    return findings(written.file), shown


def test_a_part_that_crashes_keeps_what_it_had(tmp_path: Path) -> None:
    found, shown = child(tmp_path, "r.row({'x': 1}); r.at('cell 7'); os.kill(os.getpid(), signal.SIGSEGV)", PATIENCE)
    assert found.rows == [{"x": 1}]
    assert found.problems == ["ended with status -11, at cell 7: nothing in the log"]
    assert [line.keys() - {"run", "table"} for line in shown] == [{"row"}, {"at"}, {"problem"}]


def test_a_part_that_raises_shows_the_last_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("of an earlier part\n")
    found, _ = child(tmp_path, "raise RuntimeError('an illegal memory access was encountered')", PATIENCE)
    assert found.problems == ["ended with status 1: RuntimeError: an illegal memory access was encountered"]


def test_a_part_that_overruns_its_limit_is_killed_with_its_servers(tmp_path: Path) -> None:
    code = (
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "r.row({'pid': p.pid}); r.file.open('a').write('{\"row\": {\"cut o')\n"
        "time.sleep(600)"
    )
    found, _ = child(tmp_path, code, 5.0)
    (row,) = found.rows
    assert "not done after 5 s and killed" in found.problems[0], "the line after the one cut off is whole"
    deadline = time.monotonic() + PATIENCE
    with suppress(psutil.NoSuchProcess):  # gone, or dead and waited for by nobody
        while psutil.Process(row["pid"]).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            assert time.monotonic() < deadline, "it outlived what was killed"
            time.sleep(0.05)


def test_compiled_kernels_are_packed_if_they_are_small_enough(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = job.report.file.parent / "cache"
    (cache / "KEY").mkdir(parents=True)
    for name in ("a.cubin", "a.json", "a.ttgir"):
        (cache / "KEY" / name).write_text(name)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    archive = job.report.file.parent / parts.ARCHIVE
    parts.pack(job)
    with tarfile.open(archive) as packed:
        assert sorted(packed.getnames()) == ["KEY/a.cubin", "KEY/a.json"]
    monkeypatch.setattr(parts, "MOST_ARCHIVE", 10)
    parts.pack(job)
    assert not archive.exists()
    assert "not kept" in findings(job.report.file).problems[0]


def test_tests_are_counted_and_end_with_the_device(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(job)
    ids = ["t/a.py::one", "t/a.py::two", "t/a.py::three", "t/a.py::four"]
    session: Any = SimpleNamespace(shouldstop=False, items=ids)
    watch.pytest_collection_finish(session)

    def tell(nodeid: str, when: str, outcome: str, text: str = "") -> None:
        flags = {name: outcome == name for name in ("passed", "failed")}
        watch.pytest_runtest_logreport(
            SimpleNamespace(nodeid=nodeid, when=when, outcome=outcome, longrepr=text, **flags)  # type: ignore[arg-type]
        )

    for nodeid, outcome in zip(ids, ("passed", "failed", "failed"), strict=False):
        watch.pytest_runtest_logstart(nodeid)
        tell(nodeid, "setup", "passed")
        assert not session.shouldstop
        tell(nodeid, "call", outcome, "AcceleratorError: misaligned address" if "three" in nodeid else "E: 3 is not 4")
        tell(nodeid, "teardown", "passed")
        watch.pytest_runtest_logfinish()
    assert session.shouldstop == "the device is broken for this process"
    assert watch.broken
    assert watch.count == {"passed": 1, "failed": 2, "not run": 1}
    assert findings(job.report.file).problems == [
        "t/a.py::two: E: 3 is not 4",
        "t/a.py::three: AcceleratorError: misaligned address",
    ]


def test_after_a_broken_device_the_rest_of_a_file_runs_in_a_new_process(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Told by a file whose first test says what a broken device says."""
    (tmp_path / "test_it.py").write_text(
        "def test_a(): raise RuntimeError('AcceleratorError')\ndef test_b(): pass\ndef test_c(): pass\n"
    )
    command = [sys.executable, "-c", RUN_FILE, str(job.report.file), str(tmp_path / "test_it.py")]
    for name in ("PYTEST_CURRENT_TEST", pytests.SKIP):
        monkeypatch.delenv(name, raising=False)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=parts.ROOT)
    found = findings(job.report.file)
    assert [[row[n] for n in ("passed", "failed", "not run")] for row in found.rows] == [[0, 1, 2], [2, 0, 0]]
    assert len(found.problems) == 1


RUN_FILE = """
import pathlib, sys, time
from dataclasses import replace
from loadtest.gpu import pytests
from loadtest.gpu.report import Job, Report
from loadtest.gpu.scale import DRY
job = Job(replace(DRY, device="cuda"), Report(pathlib.Path(sys.argv[1]), "run", "table"), time.monotonic() + 60)
pytests.run_file(job, sys.argv[2])
"""


def test_the_document_has_the_last_run_of_each_table_and_device(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    for run, device, of in (("1", "H100", "old"), ("2", "A100", "other"), ("3", "H100", "new")):
        Report(file, run, "machine").commit(f"c{run}")
        Report(file, run, "machine").row({"device": device, "driver": "580"})
        if run != "3":
            Report(file, run, "tests").note(f"tests of run {run}")
        Report(file, run, "steps").row({"a": 1.23456, "b": None, "c": of})
    Report(file, "3", "steps").row({"a": 1234.5, "c": "x|<y>"})
    Report(file, "3", "steps").problem("broke\nbadly")
    page = tmp_path / "gpu.md"
    page.write_text(PAGE)
    update(page, render(read(file)))
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n### ")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "tests of run 1" in text
    assert "| old |" not in text
    assert text.count("### steps: ") == 2
    section = text.split("### steps: H100")[1]
    assert "3, driver 580, torch ?, triton ?, transformers ?, bitsandbytes ?, loramux c3" in section
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
    files = [arguments[1] for name in ("smoke", "tests") for _, arguments in parts.commands(name)]
    assert len(files) == len(set(files)) > 3
    assert all((parts.ROOT / file).is_file() for file in files)


def test_a_dry_run_leaves_its_files_whatever_becomes_of_a_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One real part, by the command line; one that crashes; one that is too late. The document is there after each."""
    written: list[list[str]] = []

    def watched(command: list[str], of: Report, log: Path, seconds: float, show: Any) -> bool:
        if written or (tmp_path / "out" / "gpu.md").exists():
            written.append([table for run in read(of.file) for table in run.tables])
            assert all(f"### {table}" in (tmp_path / "out" / "gpu.md").read_text() for table in written[-1])
        crash = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
        return run_part(crash if "steps" in command else command, of, log, PATIENCE, show)

    monkeypatch.setattr(gpu_check, "run_part", watched)
    monkeypatch.setitem(PARTS, "gemm", Part("gemm", "gemm:gemm", 0.5))
    monkeypatch.setenv("GPU_CHECK_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert command(monkeypatch, "--dry-run", "--parts", "machine,steps,gemm", "--commit", "abc123") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["verdict"] == "fail"
    assert "machine: device: CPU" in " ".join(shown.err.split())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md", "log", "rows.jsonl"]
    assert written == [["machine"]]
    (run,) = read(tmp_path / "out" / "rows.jsonl")
    assert run.machine["torch"] == torch.__version__
    assert run.commit == "abc123"
    assert run.tables["steps"].problems == ["ended with status -11: nothing in the log"]
    assert run.tables["gemm"].problems == ["gemm: no time was left"]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "loramux abc123" in text

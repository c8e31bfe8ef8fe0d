"""`make gpu-check` as far as a CPU allows: every part's code on tiny shapes, and what becomes of parts that fail."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from loramux.ops.nf4 import NF4Weight

from loadtest.cli import main
from loadtest.commands import gpu_check
from loadtest.gpu import document
from loadtest.gpu import served as served_part
from loadtest.gpu.gemm import gemm
from loadtest.gpu.job import Job, OutOfTime
from loadtest.gpu.kernel_tests import Watch
from loadtest.gpu.machine import machine
from loadtest.gpu.part import PARTS, limit, run_part, soft_limit
from loadtest.gpu.peers import peers
from loadtest.gpu.random_adapter import RandomAdapters
from loadtest.gpu.random_model import RandomNF4, load_random
from loadtest.gpu.report import Findings, Report
from loadtest.gpu.served import served
from loadtest.gpu.shape import REHEARSAL
from loadtest.gpu.steps import StepBench, invariant, steps
from loadtest.server_process import ServerAddress
from tests.patience import PATIENCE

CPU = torch.device("cpu")
PAGE = f"before\n{document.BEGIN}\n{document.NOTHING}{document.END}\nafter\n"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Findings]:
    def run_in_process(part: Callable[[Job], None], seconds: float = 60.0) -> Findings:
        file = tmp_path / "rows.jsonl"
        part(Job(REHEARSAL, Report(file), time.monotonic() + seconds, bandwidth=1e10))
        return Findings.read(file)

    return run_in_process


def test_the_machine_is_described(run: Callable[..., Findings]) -> None:
    found = run(machine)
    assert not found.problems
    assert found.rows[0]["GB/s"] > 0
    assert found.rows[0]["torch"] == torch.__version__


def test_steps_are_measured_beside_their_floor(run: Callable[..., Findings]) -> None:
    found = run(steps)
    assert not found.problems
    assert [row["rows"] for row in found.rows] == list(REHEARSAL.step_rows)
    for row in found.rows:
        for kind in ("base", "1 adapter", "one each, r=2", "one each, r=1–3"):
            assert row[kind] > 0
            assert row[f"floor, {kind}"] > 0
        assert {"tax, 1 adapter", "tax, one each", "base on the clock"} <= row.keys()
        assert row["floor, one each, r=2"] > row["floor, base"]


def test_batch_invariant_mode_is_measured_or_missed_in_words(run: Callable[..., Findings]) -> None:
    found = run(invariant)
    assert not found.problems
    assert found.rows or "no batch-invariant mode" in found.notes[0]


def test_a_step_computes_with_its_adapters(tmp_path: Path) -> None:
    """What is timed is one token of each sequence, in the company of its own context, with its own adapter."""
    model = load_random(REHEARSAL.steps, CPU)
    bench = StepBench(Job(REHEARSAL, Report(tmp_path / "rows"), time.monotonic() + 60), model, 2)
    bench.prefill()
    adapters = RandomAdapters(model, [2]).take(2)
    base, first, each = (model.forward(bench.decode(2, a)).float() for a in ([], adapters[:1], adapters))
    assert torch.isfinite(base).all()
    assert not torch.equal(first, base)
    torch.testing.assert_close(each[0], first[0], rtol=2e-2, atol=2e-2)
    assert not torch.allclose(each[1], first[1], rtol=2e-2, atol=2e-2)
    # Another token before the last one changes the answer: attention reads what prefill has written.
    bench._tokens[0][3] ^= 1
    bench.prefill()
    assert not torch.equal(model.forward(bench.decode(2, [])).float()[0], base[0])


def test_random_weights_keep_the_size_of_what_goes_through() -> None:
    weight = RandomNF4(CPU).weight(256, 512, gain=0.5)
    stored = weight.to_checkpoint("w")
    codes = stored.pop("w")
    again = NF4Weight.from_checkpoint(codes, {name.removeprefix("w."): value for name, value in stored.items()})
    dense = weight.dequantize(torch.float32)
    torch.testing.assert_close(again.dequantize(torch.float32), dense, rtol=0, atol=0)
    x = torch.randn(64, 512)
    assert (x @ dense.T).std() / x.std() == pytest.approx(0.5, rel=0.1)


def test_operations_are_measured_beside_their_peers(run: Callable[..., Findings]) -> None:
    found = run(gemm)
    assert not found.problems
    assert len(found.rows) == 4 * len(REHEARSAL.gemm_rows)
    for row in found.rows:
        assert min(row["loramux"], row["bitsandbytes"], row["dense bf16"], row["× bitsandbytes"], row["floor"]) > 0


@pytest.mark.filterwarnings("ignore")
def test_peers_are_measured(run: Callable[..., Findings]) -> None:
    found = run(peers)
    assert not found.problems
    assert [(row["what"].split()[0], row["rows"]) for row in found.rows] == [
        (who, rows) for who in ("bitsandbytes", "dense") for rows in REHEARSAL.step_rows
    ]
    assert all(isinstance(row[kind], float) for row in found.rows for kind in ("base", "1 adapter", "one each, r=2"))


def test_a_real_server_answers_in_a_batch_as_alone(run: Callable[..., Findings]) -> None:
    found = run(served)
    assert not found.problems
    (row,) = found.rows
    assert row["answers as alone"] == "16 of 16"
    assert all(row[name] > 0 for name in ("1 requests, base", "4 requests, base", "4 requests, 2 adapters"))


def test_the_servers_flags_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag, known in (("--max-context", True), ("--no-such-thing", False)):
        monkeypatch.setattr(served_part, "FLAG", flag)
        assert served_part.has_flag() is known


@pytest.mark.parametrize("flag", [True, False])
def test_answers_that_differ_fail_where_they_are_promised(
    flag: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[bool] = []

    @contextmanager
    def serve(arguments: list[str], folder: Path, **_: Any) -> Iterator[ServerAddress]:
        started.append(served_part.FLAG in arguments)
        yield ServerAddress("public", "admin", "metrics")

    async def equal_answers(*_: Any) -> int:
        return 15

    monkeypatch.setattr(served_part, "serve", serve)
    monkeypatch.setattr(served_part, "equal_answers", equal_answers)
    monkeypatch.setattr(served_part, "has_flag", lambda: flag)
    report = Report(tmp_path / "rows.jsonl")
    scale = replace(REHEARSAL, device="cuda", served_requests=())
    job = Job(scale, report, time.monotonic() + 60)
    served_part.both_modes(job, "model", "model", REHEARSAL.served.config(), tmp_path)
    found = Findings.read(tmp_path / "rows.jsonl")
    assert started == ([False, True] if flag else [False])
    assert [row["answers as alone"] for row in found.rows] == ["15 of 16"] * len(started)
    (problem,) = found.problems
    assert ("1 of 16 answers differ" if flag else "has no --batch-invariant") in problem


def test_what_fails_is_told_and_the_rest_goes_on(run: Callable[..., Findings]) -> None:
    def part(job: Job) -> None:
        with job.report.filling(rows=1) as row:
            row["first"] = job.attempt("a cell", lambda: 1 / 0)
            row["second"] = job.attempt("another", lambda: 2.5)

    found = run(part)
    assert found.rows == [{"rows": 1, "first": None, "second": 2.5}]
    assert found.problems == ["a cell: ZeroDivisionError: division by zero"]


def test_time_that_is_up_within_a_cell_is_no_failure_of_the_cell(run: Callable[..., Findings]) -> None:
    def part(job: Job) -> None:
        job.attempt("a server", lambda: (time.sleep(0.02), job.attempt("a rate", lambda: 1.0)))

    with pytest.raises(OutOfTime):
        run(part, seconds=0.01)


def test_without_time_nothing_begins(run: Callable[..., Findings], tmp_path: Path) -> None:
    with pytest.raises(OutOfTime):
        run(gemm, seconds=0.0)
    assert "loramux" not in Findings.read(tmp_path / "rows.jsonl").rows[0]


def child(tmp_path: Path, code: str, seconds: float) -> Findings:
    rows = tmp_path / "rows.jsonl"
    head = f"from pathlib import Path; from loadtest.gpu.report import Report; r = Report(Path({str(rows)!r}))\n"
    return run_part([sys.executable, "-c", head + code], rows, tmp_path / "log", seconds)


def test_a_part_that_crashes_keeps_what_it_had(tmp_path: Path) -> None:
    found = child(tmp_path, "r.row({'x': 1}); r.at('cell 7'); import os, signal; os.kill(os.getpid(), 11)", 20)
    assert found.rows == [{"x": 1}]
    assert found.problems == ["ended with -11, at cell 7"]


def test_a_part_that_raises_shows_the_last_line(tmp_path: Path) -> None:
    found = child(tmp_path, "raise RuntimeError('CUDA error: an illegal memory access was encountered')", 20)
    assert found.problems == ["ended with status 1: RuntimeError: CUDA error: an illegal memory access was encountered"]


def test_a_part_that_hangs_is_killed_with_its_servers(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "r.row({'pid': p.pid}); open(r._file, 'a').write('{\"row\": {\"cut o')\n"
        "time.sleep(600)"
    )
    found = child(tmp_path, code, 2.0)
    (row,) = found.rows
    assert "not done after 2 s and killed" in found.problems[0]
    deadline = time.monotonic() + PATIENCE
    with suppress(psutil.NoSuchProcess):  # gone, or dead and waited for by nobody
        while psutil.Process(row["pid"]).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            assert time.monotonic() < deadline, "it outlived what was killed"
            time.sleep(0.05)


def test_no_part_gets_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = child(tmp_path, "import os; r.row({'is': os.environ.get('TRITON_INTERPRET')})", 20)
    assert found.rows == [{"is": None}]


def test_the_shares_are_all_the_time_and_no_more() -> None:
    left, given = 450.0, []
    for i, part in enumerate(PARTS):
        given.append(limit(part, PARTS[i + 1 :], left))
        left -= given[-1]
    assert left == pytest.approx(0.0)
    assert min(given) > 10
    assert 0 < soft_limit(20.0) < 20.0
    assert soft_limit(100.0) == 92.0


def test_outcomes_are_counted_by_file(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    watch = Watch(Report(file), time.monotonic() - 1)
    ids = ["t/a.py::one", "t/a.py::two", "t/b.py::three", "t/b.py::four"]
    session: Any = SimpleNamespace(shouldstop=False)
    watch.pytest_collection_modifyitems(session, [SimpleNamespace(nodeid=i) for i in ids])  # type: ignore[misc]

    def report(nodeid: str, when: str, outcome: str, text: str = "") -> Any:
        flags = {name: outcome == name for name in ("passed", "failed")}
        return SimpleNamespace(nodeid=nodeid, when=when, outcome=outcome, longrepr=text, **flags)

    for nodeid, call in zip(ids, ("passed", "failed", None), strict=False):
        watch.pytest_runtest_logstart(nodeid)
        watch.pytest_runtest_logreport(report(nodeid, "setup", "passed" if call else "skipped"))
        if call:
            watch.pytest_runtest_logreport(report(nodeid, "call", call, "AssertionError: 3 is not 4"))
            watch.pytest_runtest_logreport(report(nodeid, "teardown", "passed"))
        watch.pytest_runtest_logfinish()
    assert session.shouldstop
    watch.tell()
    found = Findings.read(file)
    assert found.rows == [
        {"tests": "t/a.py", "passed": 1, "failed": 1, "skipped": 0, "not run": 0},
        {"tests": "t/b.py", "passed": 0, "failed": 0, "skipped": 1, "not run": 1},
    ]
    assert found.problems == ["t/a.py::two: AssertionError: 3 is not 4", "1 tests were not run: their time was up"]
    assert found.at == "t/b.py::three"


def test_rows_of_the_same_device_are_replaced_and_no_others(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(PAGE)
    document.update(page, "H100", {"steps": "old steps", "machine": "old machine"})
    document.update(page, "A100 | 40", {"steps": "other"})
    document.update(page, "H100", {"steps": "new steps"})
    text = page.read_text()
    assert "old steps" not in text
    assert "never run" not in text
    assert [text.index(w) for w in ("before", "old machine", "new steps", "other", "after")] == sorted(
        text.index(w) for w in ("before", "old machine", "new steps", "other", "after")
    )
    page.write_text("no markers")
    with pytest.raises(ValueError, match="no lines"):
        document.update(page, "H100", {})


def test_the_page_of_this_checkout_has_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(gpu_check.DOCUMENT.read_text())
    document.update(page, "some device", {"gemm": "text"})
    assert "text" in page.read_text()


def test_a_block_tells_failures_first_and_escapes() -> None:
    found = Findings([{"a": 1.23456, "b": None}, {"a": 1234.5, "c": "x|y"}], ["a <note>"], ["broke\nbadly"])
    assert document.block("gemm", "H100", "stamp", found).splitlines()[2:] == [
        "stamp",
        "",
        "- **failed**: broke badly",
        "",
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1.23 | – | – |",
        "| 1,234 | – | x\\|y |",
        "",
        "- a &lt;note>",
    ]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["loadtest", "gpu-check", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_without_a_device_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(monkeypatch) == 2
    shown = capsys.readouterr()
    assert "sees no CUDA device" in shown.err
    assert shown.out == ""


def test_unknown_blocks_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--dry-run", "--only", "steps,speed") == 2
    assert "not speed" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_one_failed_part_fails_the_check_and_the_others_are_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran: list[tuple[str, float]] = []

    def check(part: Any, scratch: Path, seconds: float, dry_run: bool, bandwidth: float) -> Findings:
        ran.append((part.name, bandwidth))
        if part.name == "machine":
            return Findings([{"device": "H100", "GB/s": 3000.0, "driver": "580"}])
        return Findings([{"of": part.name}], [], ["it broke"] if part.name == "gemm" else [])

    monkeypatch.setattr(gpu_check, "check", check)
    page = tmp_path / "gpu.md"
    page.write_text(PAGE)
    assert command(monkeypatch, "--dry-run", "--document", str(page), "--commit", "abc123") == 1
    assert ran == [(part.name, 0.0 if part.name == "machine" else 3e12) for part in PARTS]
    text = page.read_text()
    assert "- **failed**: it broke" in text
    for words in ("driver 580", "loramux abc123", "| peers |", "| smollm2 |", "### Tests on the device: H100"):
        assert words in text
    assert '"verdict": "fail"' in capsys.readouterr().out


def test_a_part_by_the_command_line(tmp_path: Path) -> None:
    (part,) = (part for part in PARTS if part.name == "machine")
    found = gpu_check.check(part, tmp_path, 60.0, True, 0.0)
    assert not found.problems, (tmp_path / "machine.log").read_text()
    assert found.rows[0]["driver"] == "none"

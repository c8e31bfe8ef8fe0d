"""Files of tests on the device, a process a file: the smoke, the kernels' own tests; and the smoke under
compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest

from loadtest.gpu.parts import ROOT
from loadtest.gpu.report import Job

SKIP = "GPU_CHECK_SKIP"  # tests of the file that were run before the device broke
# Warnings of a library in another version are no failures here, nor is anything compiled for cards that are not here.
PYTEST = (sys.executable, "-m", "pytest")
OPTIONS = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", f"--rootdir={ROOT}", "-k", "not compile"]


def run_file(job: Job, file: str) -> None:
    """A row of the file's outcomes, and a problem for each failure. Tests that time does not allow are counted, too."""
    if job.scale.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    watch = Watch(job)
    status = pytest.main([*OPTIONS, str(ROOT / file)], plugins=[watch])
    outcomes = ("passed", "failed", "skipped", "not run")
    job.report.row({"tests": file, **{outcome: watch.count[outcome] for outcome in outcomes}})
    if watch.broken and watch.count["not run"]:
        # The rest in a process whose device is whole.
        done = watch.count.total() - watch.count["not run"]
        os.environ[SKIP] = str(int(os.environ.get(SKIP, 0)) + done)
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606
    if watch.count["not run"]:
        job.report.problem(f"{file}: {watch.count['not run']} tests were not run{watch.reason}")
    if not watch.count.total():
        job.report.problem(f"{file}: pytest ended with {pytest.ExitCode(status).name}, no test was found")


class Watch:
    """A pytest plugin: counts outcomes, and ends the run when time is up or the device is broken."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._session: pytest.Session | None = None
        self.count: Counter[str] = Counter()
        self.reason = ""
        self.broken = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Not those that were run before the device broke. A dry run has time for one test of each file: in Triton's
        interpreter they take minutes."""
        del items[: int(os.environ.get(SKIP, 0))]
        if self._job.scale.device == "cpu":
            del items[:-1]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Know what there is to run."""
        self._session = session
        self.count["not run"] = len(session.items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure, and nothing else would say so."""
        if report.failed:
            self._failed(report.nodeid, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Remember where we are."""
        self._job.report.at(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Once for a test's call; for its setup and teardown if they decide."""
        if report.when != "call" and report.passed:
            return
        self.count["not run"] -= report.when != "teardown"
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._failed(report.nodeid, str(crash.message if crash else report.longrepr))
        else:
            self.count[report.outcome] += 1

    def pytest_runtest_logfinish(self) -> None:
        """Stop in good time, with a summary."""
        if self._job.left <= 0:
            self._stop("time was up")

    def _failed(self, nodeid: str, message: str) -> None:
        self.count["failed"] += 1
        lines = [line.strip() for line in message.splitlines() if line.strip()] or ["-"]
        self._job.report.problem(f"{nodeid}: {lines[-1 if len(lines) > 3 else 0]}"[:300])
        if "AcceleratorError" in message:
            self.broken = True
            self._stop("the device is broken for this process")

    def _stop(self, reason: str) -> None:
        self.reason = self.reason or f": {reason}"
        if self._session is not None:
            self._session.shouldstop = reason


def sanitize(job: Job) -> None:
    """The smoke at small shapes (GPU_SMOKE=small) under compute-sanitizer: a row a tool, a problem if it finds any."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        job.report.note("No compute-sanitizer is on the PATH: nothing was checked.")
        return
    # Each tensor gets an allocation of its own, or a read beyond it stays within memory that is allocated. No graph can
    # be recorded then.
    environment = {**os.environ, "GPU_SMOKE": "small", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    files = [str(path) for path in sorted(ROOT.glob("tests/gpu/test_smoke_*.py")) if "graphs" not in path.name]
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            f"--tool={check}",
            "--error-exitcode=9",
            sys.executable,
            "-m",
            "pytest",
            *OPTIONS,
            "-x",
            *files,
        ]
        begin = time.monotonic()
        status = job.attempt(check, lambda: subprocess.run(command, timeout=job.left, env=environment).returncode)  # noqa: B023
        job.report.row({"tool": check, "status": status, "seconds": round(time.monotonic() - begin, 1)})
        if status:
            job.report.problem(f"{check}: status {status} (9: it found errors, which are in the log)")

"""Runs the tests that need the device: every kernel against the reference, models against transformers, a server."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from loadtest.gpu.job import Job
from loadtest.gpu.machine import ROOT
from loadtest.gpu.report import Report

MOST_FAILURES = 20


def kernel_tests(job: Job) -> None:
    """A row for each file, and a problem for each failure. Tests that time does not allow are counted, too."""
    paths = [ROOT / "tests" / "gpu"]
    if job.scale.device == "cuda":  # elsewhere they need Triton's interpreter, and `make test` runs them
        paths += sorted((ROOT / "tests" / "ops").glob("test_triton_*.py"))
    watch = Watch(job.report, job.deadline)
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--confcutdir={ROOT}"]
    # Without pytest-asyncio its settings are unknown ones: only the tests that need it are to fail.
    options += ["-W", "default::pytest.PytestConfigWarning"]
    status = pytest.main([*options, *map(str, paths)], plugins=[watch])
    watch.tell()
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        job.report.problem(f"pytest ended with {pytest.ExitCode(status).name}")
    if job.scale.device == "cuda" and not watch.total("passed"):
        job.report.problem("no test ran on the device")


class Watch:
    """A pytest plugin: counts outcomes by file, and ends the run when time is up."""

    def __init__(self, report: Report, deadline: float) -> None:
        self._report, self._deadline = report, deadline
        self._files: dict[str, Counter[str]] = {}
        self._failures = 0
        self._session: Any = None

    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Know what there is to run."""
        self._session = session
        for item in items:
            self._count(item.nodeid)["not run"] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure, and nothing else would say so."""
        if report.failed:
            self._count(report.nodeid)["failed"] += 1
            self._failed(report.nodeid, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Remember where we are."""
        self._report.at(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Once for a test's call; for its setup and teardown if they decide."""
        if report.when != "call" and report.passed:
            return
        count = self._count(report.nodeid)
        count["not run"] -= report.when != "teardown"
        count[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._failed(report.nodeid, str(crash.message if crash else report.longrepr))

    def pytest_runtest_logfinish(self) -> None:
        """Stop in good time, with a summary."""
        if time.monotonic() > self._deadline and self._session is not None:
            self._session.shouldstop = "the time for tests is up"

    def _count(self, nodeid: str) -> Counter[str]:
        return self._files.setdefault(nodeid.split("::", 1)[0], Counter())

    def _failed(self, nodeid: str, message: str) -> None:
        self._failures += 1
        if self._failures <= MOST_FAILURES:
            lines = [line.strip() for line in message.splitlines() if line.strip()]
            self._report.problem(f"{nodeid}: {lines[-1 if len(lines) > 3 else 0] if lines else '-'}"[:300])
        elif self._failures == MOST_FAILURES + 1:
            self._report.problem(f"more than {MOST_FAILURES} tests failed; the others are not listed")

    def total(self, outcome: str) -> int:
        """Tests of all files that ended so."""
        return sum(count[outcome] for count in self._files.values())

    def tell(self) -> None:
        """The rows."""
        for file, count in self._files.items():
            self._report.row({"tests": file, **{n: count[n] for n in ("passed", "failed", "skipped", "not run")}})
        if self.total("not run"):
            self._report.problem(f"{self.total('not run')} tests were not run: their time was up")

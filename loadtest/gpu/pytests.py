"""Files of tests on the device, a process a file: the smoke, the kernels' own tests; and the smoke under
compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest
from loramux.ops.device import is_lost

from loadtest.gpu.parts import ROOT
from loadtest.gpu.report import Job

SKIP = "GPU_CHECK_SKIP"  # tests of the file that were run before the device broke
# Warnings of a library in another version are no failures here, nor is anything compiled for cards that are not here.
# Where a test kills the process, its name shall be the log's last line.
OPTIONS = [
    "-v", "-o", "filterwarnings=", "-p", "no:cacheprovider", "-p", "no:faulthandler", f"--rootdir={ROOT}",
    "-k", "not compile",
]  # fmt: skip


def run_file(job: Job, file: str) -> None:
    """A row of the file's outcomes, and a problem for each failure. After one that broke the device the rest is run in
    a new process, with a row of its own; tests that time does not allow are a problem, too."""
    if job.scale.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    watch = Watch(job, skip=int(os.environ.get(SKIP, 0)))
    status = pytest.main([*OPTIONS, f"--session-timeout={job.seconds}", str(ROOT / file)], plugins=[watch])
    job.tell(row={"tests": file, **watch.count})
    left = watch.count["not run"]
    if watch.lost and left:
        os.environ[SKIP] = str(watch.found - left)
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606
    if left or not watch.found:
        job.tell(problem=f"{file}: pytest ended with {pytest.ExitCode(status).name}, {left} tests were not run")


class Watch:
    """A pytest plugin: counts outcomes, tells failures, and ends the run when the device is lost."""

    def __init__(self, job: Job, skip: int) -> None:
        self._job, self._skip = job, skip
        self.count = Counter(dict.fromkeys(("passed", "failed", "skipped", "not run"), 0))
        self.found = 0
        self.lost = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """A dry run has time for one test of each file: in Triton's interpreter they take minutes."""
        self.found = len(items)
        del items[: -1 if self._job.scale.device == "cpu" else self._skip]
        self.count["not run"] = len(items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Once for a test's call; for its setup and teardown if they decide."""
        self.count["not run"] -= report.when == "setup"
        if report.when == "call" or not report.passed:
            self.count[report.outcome] += 1

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        """Of a test, or of a file that cannot be imported."""
        assert call.excinfo is not None
        self._job.tell(problem=f"{node.nodeid}: {' '.join(call.excinfo.exconly().split())}"[:1000])
        if is_lost(call.excinfo.value):
            self.lost = True
            node.session.shouldstop = "the device is lost for this process"


def sanitize(job: Job) -> None:
    """The smoke at small shapes (GPU_SMOKE=small) under compute-sanitizer: a row a tool, a problem if it finds any."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        job.tell(note="No compute-sanitizer is on the PATH: nothing was checked.")
        return
    # Each tensor gets an allocation of its own, or a read beyond it stays within memory that is allocated. No graph can
    # be recorded then.
    environment = {**os.environ, "GPU_SMOKE": "small", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    files = [str(path) for path in sorted(ROOT.glob("tests/gpu/test_smoke_*.py")) if "graphs" not in path.name]
    pytest_command = [sys.executable, "-m", "pytest", *OPTIONS, "-x", *files]
    for check in ("memcheck", "racecheck"):
        with job.row(tool=check) as row:
            begin = time.monotonic()
            command = [tool, f"--tool={check}", "--error-exitcode=9", *pytest_command]
            row["status"] = subprocess.run(command, env=environment, check=False).returncode
            row["seconds"] = round(time.monotonic() - begin, 1)
            if row["status"]:
                raise ValueError(f"status {row['status']} (9: it found errors, which are in the log)")

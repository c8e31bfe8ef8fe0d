"""Programs that are run on the way do not outlive what waits for them."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from loramux import children
from loramux.children import Children


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to this")


def test_what_they_say_and_how_they_end() -> None:
    done = Children().run(["sh", "-c", "echo out; cat; exit 3"], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (3, "out\n")  # and nothing waits for somebody to type
    with pytest.raises(FileNotFoundError):
        Children().run(["/nowhere/program"])


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"])
def test_after_its_time_the_whole_group_is_ended(trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_GRACE_SECONDS", 0.1)
    pids = tmp_path / "pids"
    script = f"{trap} sleep 600 & echo $! > {pids}.new; echo $$ >> {pids}.new; mv {pids}.new {pids}; wait; sleep 600"
    with pytest.raises(subprocess.TimeoutExpired):
        Children().run(["sh", "-c", script], timeout=3)
    until(pids.exists)
    for pid in map(int, pids.read_text().split()):
        until(lambda pid=pid: not lives(pid))  # type: ignore[misc]


def test_stop_ends_those_of_all_threads_and_lets_none_begin(tmp_path: Path) -> None:
    group = Children()
    ended: list[int] = []

    def run(name: str) -> None:
        ended.append(group.run(["sh", "-c", f"touch {tmp_path}/{name}; exec sleep 600"]).returncode)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    group.stop()
    for thread in threads:
        thread.join(60)
    assert len(ended) == 2
    assert all(status < 0 for status in ended)
    with pytest.raises(InterruptedError):
        group.run(["true"])

"""Other programs that are run on the way (a compiler, pip, a server): they never outlive what waits for them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

_GRACE_SECONDS = 5.0  # for a compiler or pip to remove its temporary files
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Children:
    """Runs programs, in any threads; `stop` ends those that run and lets no other begin."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: set[subprocess.Popen[Any]] = set()
        self._stopped = False

    def run(
        self, command: Sequence[str], *, timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """As subprocess.run, without standard input, and with the whole process group ended when the wait is.

        Raises OSError if it cannot be run, subprocess.TimeoutExpired after `timeout` seconds.
        """
        with self._lock:
            if self._stopped:
                raise InterruptedError("stopped")
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, **options)  # noqa: S603
            self._running.add(child)
        try:
            out, err = child.communicate(timeout=timeout)
        except BaseException:
            end(child, _GRACE_SECONDS)
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()
            raise
        finally:
            with self._lock:
                self._running.discard(child)
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    def stop(self) -> None:
        """End the running ones; who waits for them sees them end."""
        with self._lock:
            self._stopped = True
            running = tuple(self._running)
        for child in running:
            _signal(child, signal.SIGTERM)
        for child in running:
            end(child, _GRACE_SECONDS)


def end_with_parent() -> None:
    """To be called in a child before its program runs (`preexec_fn`): it gets SIGTERM when its parent's thread has
    ended, however that was. Linux only; elsewhere it does nothing."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def end(child: subprocess.Popen[Any], grace: float) -> None:
    """SIGTERM to the process group that `child` leads, and SIGKILL to what is left of it once `child` has ended, at
    the latest after `grace` seconds. `child` must not have been waited for."""
    _signal(child, signal.SIGTERM)
    try:
        child.wait(grace)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal(child, signal.SIGKILL)  # of the group, whatever is left of it
        child.wait()


def _signal(child: subprocess.Popen[Any], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)

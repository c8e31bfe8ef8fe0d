"""What peers have in common that are servers with an HTTP API: a child process, its health, requests, cells in turn."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loadtest.cells import Cell
from loadtest.peers.peer import Measured, PeerUnavailable
from loadtest.server_process import tail
from loadtest.workload import PlannedRequest, plan, warmup

VOCABULARY_OF_PLANS = 32_000
STOP_TIMEOUT = 10.0
REQUEST_TIMEOUT = 600.0
Complete = Callable[[PlannedRequest], int]


@contextmanager
def http_server(
    command: Sequence[str], url: str, log: Path, environment: Mapping[str, str], start_timeout: float
) -> Iterator[None]:
    """Run a server until its /health under `url` answers, and stop it, with all that it started, at the end.

    `log` takes its output. Raises PeerUnavailable, with the end of the log, if it ends before or is not up after
    `start_timeout` seconds.
    """
    with log.open("wb") as output:
        # In a process group of its own, so that its workers can be ended with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait(process, Path(command[0]).name, f"{url}/health", log, start_timeout)
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cells_in_turn(
    cells: Sequence[Cell], names: tuple[str, ...], runs: int, seed: int, complete: Complete
) -> Generator[Measured]:
    """Measure each cell once, then each again, `runs` times in all, each after the warm-up that our server gets, too.

    `names` are the adapters; `complete` sends one request and returns the number of tokens in its answer.
    """
    for i in range(runs):
        for cell in cells:
            workload = cell.workload(VOCABULARY_OF_PLANS, names, seed + i)
            send(plan(warmup(workload, cell.concurrency)), cell.concurrency, complete)
            requests = plan(workload)
            begin = time.perf_counter()
            tokens = send(requests, cell.concurrency, complete)
            seconds = time.perf_counter() - begin
            counted = sum(len(request.prompt_ids) for request in requests) if cell.counts_prompt else tokens
            yield Measured(cell.name, counted / seconds)


def send(requests: Sequence[PlannedRequest], concurrency: int, complete: Complete) -> int:
    """Send the requests, `concurrency` at a time; return the number of tokens in all answers."""
    with ThreadPoolExecutor(concurrency) as pool:
        return sum(pool.map(complete, requests))


def post(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Send JSON and return the JSON answered. Raises PeerUnavailable if there is another answer, or none."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT) as answer:  # noqa: S310 - http on loopback
            found: dict[str, Any] = json.loads(answer.read())
            return found
    except urllib.error.HTTPError as error:
        raise PeerUnavailable(f"{url} answered {error.code}: {error.read().decode()[:300]}") from error
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        raise PeerUnavailable(f"{url} did not answer: {error}") from error


def _wait(process: subprocess.Popen[bytes], name: str, url: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        status = process.poll()
        if status is not None:
            how = f"status {status}" if status >= 0 else signal.Signals(-status).name
            raise PeerUnavailable(f"{name} ended with {how} at start\n{tail(log)}".rstrip())
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - http on loopback
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.2)
    raise PeerUnavailable(f"{name} was not up after {timeout:g} s\n{tail(log)}".rstrip())

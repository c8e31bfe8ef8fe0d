"""Runs `loramux serve` as a child process on ports of its own choosing. Knows nothing of what it serves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STOP_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server listens: "host:port" for gRPC, a URL for metrics; its process, if it is on this machine."""

    target: str
    admin: str
    metrics: str
    pid: int | None = None


class ServerFailed(Exception):
    """The child did not come up or did not stop cleanly; the text ends with the last lines of its log."""


@contextmanager
def serve(
    arguments: Sequence[str],
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    start_timeout: float = 300.0,
) -> Iterator[ServerAddress]:
    """Start `loramux serve ARGUMENTS` on free ports, wait for its ports, and stop it by SIGTERM at the end.

    `folder` takes the log (server.log) and the ports file. Raises ServerFailed if the server is not up after
    `start_timeout` seconds, or, when the body raised nothing, does not end with status 0.
    """
    ports_file, log = folder / "ports.json", folder / "server.log"
    ports_file.unlink(missing_ok=True)
    ports = ["--port", "0", "--admin-port", "0", "--metrics-port", str(free_port())]
    command = [sys.executable, "-m", "loramux", "serve", "--ports-file", str(ports_file), *ports, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    try:
        yield wait_for_ports(process, ports_file, log, start_timeout)
        process.terminate()
        status = process.wait(STOP_TIMEOUT)
        if status != 0:
            raise ServerFailed(f"the server ended with status {status}\n{tail(log)}")
    except subprocess.TimeoutExpired:
        raise ServerFailed(f"the server did not stop within {STOP_TIMEOUT:.0f} s\n{tail(log)}") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def free_port() -> int:
    """Return a port that was free just now (the server reads --metrics-port 0 as "no metrics")."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_ports(process: subprocess.Popen[bytes], ports_file: Path, log: Path, timeout: float) -> ServerAddress:
    """Return the addresses once the child has written them. Raises ServerFailed if it ends before, or is late."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with status {process.returncode} at start\n{tail(log)}")
        try:
            ports = json.loads(ports_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.1)
            continue
        return ServerAddress(
            target=ports["public"],
            admin=ports["admin"],
            metrics=f"http://{ports['metrics']}/metrics",
            pid=int(ports["pid"]),
        )
    raise ServerFailed(f"the server was not up after {timeout:.0f} s\n{tail(log)}")


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])

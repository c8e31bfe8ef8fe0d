"""A Python that has made slow imports already, for tests that start many processes which need them.

One process imports the modules, and forks for each command. What a test starts is a small process that hands on its
arguments, standard streams and SIGTERM, and ends as the forked one does. One command runs at a time. SIGKILL reaches
the small one only: to kill what it stands for, ask that for its process id.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def preloaded(folder: Path, *modules: str) -> Iterator[tuple[str, ...]]:
    """The beginning of a command, to be followed by a script and its arguments. `folder` takes a socket."""
    path = str(folder / "socket")
    process = subprocess.Popen([sys.executable, "-P", __file__, "serve", path, *modules], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
        yield (sys.executable, "-PS", __file__, "start", path)
    finally:
        process.terminate()
        process.wait()


def serve(path: str, *modules: str) -> None:
    """Fork for each command; returns in the forked process, when it has run its script."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # a collection in a forked process would touch, and thereby copy, all of it
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                content, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
                pid = os.fork()
                if not pid:
                    break
                for descriptor in descriptors:
                    os.close(descriptor)
                connection.sendall(pid.to_bytes(4, "big"))
                connection.sendall(os.waitpid(pid, 0)[1].to_bytes(4, "big"))
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = json.loads(content)
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(path: str, *arguments: str) -> int:
    """Have the command run, and return its exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(arguments).encode()], [0, 1, 2])
        pid = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")

        def hand_on(number: int, frame: object) -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

        signal.signal(signal.SIGTERM, hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        for descriptor in range(3):  # so that who reads from the command sees its end
            os.close(descriptor)
        status = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    code = os.waitstatus_to_exitcode(status)
    if code < 0:  # a signal ended it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit({"serve": serve, "start": start}[sys.argv[1]](*sys.argv[2:]))

"""Stands in for `bin/vllm`: the same API over HTTP, and a record of what it was asked, one JSON value a line.

Run as `fake_vllm.py FOLDER serve …`; writes FOLDER/starts and FOLDER/requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

folder, arguments = Path(sys.argv[1]), sys.argv[2:]
lock = Lock()


def record(file: str, value: object) -> None:
    """Append `value` to FOLDER/`file`."""
    with lock, (folder / file).open("a") as out:
        out.write(json.dumps(value) + "\n")


class Handler(BaseHTTPRequestHandler):
    """/health and /v1/completions; the model "refused" is refused, the others generate a token less than asked for."""

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        record("requests", {"path": self.path, **body})
        if body["model"] == "refused":
            self.answer(404, {"error": {"message": "The model `refused` does not exist."}})
        else:
            self.answer(200, {"usage": {"completion_tokens": body["max_tokens"] - 1}})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        """Send JSON."""
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


worker = subprocess.Popen(["sleep", "600"])
variables = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "PYTHONPATH"))}
record("starts", {"arguments": arguments, "variables": variables, "worker": worker.pid})
port = int(arguments[arguments.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()

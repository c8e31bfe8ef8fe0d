"""The process in which a server merges (python -m loramux.merge_worker): a job on stdin, lines of JSON on stdout.

A process of its own, because building a model's skeleton changes torch's defaults for all threads, and so that its
memory and its time are not the server's. SIGTERM ends it between two tensors, and so does a server that is gone;
what it wrote so far goes with it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from loramux import logs
from loramux.errors import LoramuxError
from loramux.importing import heavy_imports
from loramux.lora.folder import AdapterFolder
from loramux.lora.ingredient import Ingredient
from loramux.rpc import status

log = logging.getLogger(__name__)

_NICENESS = 10  # requests come first


def main(hold: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Read the job, merge, and say {"done", "total"} before each tensor, then {"report"} or {"error"}.

    `hold` is called after each line of progress.
    """
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints must not get between the lines
    logs.configure("warning")
    signal.signal(signal.SIGTERM, _leave)
    os.nice(_NICENESS)
    with heavy_imports():
        import torch

        from loramux.merge import merge
    torch.set_num_threads(1)

    def say(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")

    def progress(done: int, total: int) -> None:
        say({"done": done, "total": total})
        hold(done, total)

    job = json.load(sys.stdin)
    ingredients = [
        Ingredient(name, AdapterFolder(Path(path), tuple(map(Path, roots))), weight, digest)
        for name, path, roots, weight, digest in job["parts"]
    ]
    try:
        report = merge(job["model"], ingredients, Path(job["out"]), dtype=job["dtype"], progress=progress)
    except LoramuxError as error:
        log.error("merge into %s: %s", job["out"], error.message)
        rich = status.from_error(error)
        details = base64.b64encode(rich.SerializeToString()).decode()
        say({"error": {"code": status.code_of(rich).name, "message": rich.message, "details": details}})
        return
    say({"report": report.summary()})


def _leave(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end what clears away
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()

"""PEFT in a process of its own for each cell, whose threads end with it; `python -m loadtest peers peft` is it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.cells import Cell
from loadtest.peers.peer import Measured, PeerUnavailable


@dataclass(frozen=True, slots=True)
class PeftProcess:
    """PEFT with `model` and the adapters in the folder `root`; each cell is one static batch."""

    model: str
    root: Path
    cells: Sequence[Cell]
    runs: int
    name: str = "peft"

    def measure(self, seed: int) -> Generator[Measured]:
        """See Peer; the runs of a cell come together, since the model is built anew for each cell."""
        for cell in self.cells:
            command = [sys.executable, "-m", "loadtest", "peers", "peft", "--model", self.model]
            command += ["--adapter-dir", str(self.root), "--adapters", str(cell.adapters)]
            command += ["--concurrency", str(cell.concurrency), "--prompt-len", str(cell.prompt_len)]
            command += ["--output-len", str(cell.output_len), "--runs", str(self.runs), "--seed", str(seed)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise PeerUnavailable(done.stderr.strip()[-300:])
            for rate in json.loads(done.stdout.strip().splitlines()[-1])["output_throughput_runs"]:
                yield Measured(cell.name, rate)

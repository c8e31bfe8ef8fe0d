"""vLLM's server, on the NF4 weights that our server computes with, dequantized once to a bf16 folder.

Its base-only cells are measured on a server of their own, started without LoRA; prefix caching is off. Requests carry
the same token ids and lengths, greedy, end-of-sequence ignored.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loadtest.cells import Cell
from loadtest.peers.http_server import cells_in_turn, http_server, post
from loadtest.peers.peer import Measured
from loadtest.server_process import free_port
from loadtest.workload import PlannedRequest

START_TIMEOUT = 600.0  # it compiles at start
BASE = "base"
KV_CACHE_GIB = 2


@dataclass(frozen=True, slots=True)
class VllmPeer:
    """vLLM from the virtual environment `venv`, serving `model` (as `loramux serve --model` takes it).

    `adapters` are PEFT folders of rank `rank` or less; `slots` requests run at a time, of `slot_tokens` tokens or less.
    """

    venv: Path
    model: str
    adapters: Sequence[Path]
    rank: int
    scratch: Path
    cells: Sequence[Cell]
    runs: int
    slots: int
    slot_tokens: int
    name: str = "vllm"

    def measure(self, seed: int) -> Generator[Measured]:
        """See Peer: the cells of the base alone first."""
        from loramux.model.loading import write_dense

        folder = self.scratch / "vllm-model"
        write_dense(self.model, folder)
        names = tuple(adapter.name for adapter in self.adapters)
        for served in ((), self.adapters):
            cells = [cell for cell in self.cells if bool(cell.adapters) == bool(served)]
            if cells:
                with self._server(folder, served) as url:
                    yield from cells_in_turn(cells, names, self.runs, seed, partial(complete, url))

    @contextmanager
    def _server(self, folder: Path, adapters: Sequence[Path]) -> Iterator[str]:
        port = free_port()
        command = [str(self.venv / "bin" / "vllm"), "serve", str(folder), "--served-model-name", BASE]
        command += ["--dtype", "bfloat16", "--max-model-len", str(self.slot_tokens), "--max-num-seqs", str(self.slots)]
        command += ["--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port)]
        if adapters:
            command += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(self.rank)]
            command += ["--lora-modules", *(f"{adapter.name}={adapter}" for adapter in adapters)]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        url = f"http://127.0.0.1:{port}"
        log = self.scratch / ("vllm-lora.log" if adapters else "vllm-base.log")
        with http_server(command, url, log, environment, START_TIMEOUT):
            yield url


def complete(url: str, request: PlannedRequest) -> int:
    """Send a request to the server at `url`; return the number of tokens generated. Raises PeerUnavailable."""
    body = {
        "model": request.adapter or BASE,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.output_len,
        "temperature": 0,
        "ignore_eos": True,
    }
    return int(post(f"{url}/v1/completions", body)["usage"]["completion_tokens"])

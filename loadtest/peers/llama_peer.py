"""The peer that runs everywhere: llama.cpp's server, with a Q4_0 model and one LoRA file an adapter.

It gets the same prompts and lengths, greedy, end-of-sequence ignored, one request a slot, each with its own adapter by
the request's `lora` field. Adapters are converted here; queries and keys are not permuted as llama.cpp's own converter
does, so the answers are of no use and the work is the same.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtest.server_process import free_port
from loadtest.workload import PlannedRequest

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
START_TIMEOUT = 120.0


class LlamaUnavailable(Exception):
    """llama.cpp cannot be had or does not run here; the text says why."""


class LlamaServer:
    """A running server."""

    def __init__(self, url: str, names: Sequence[str]) -> None:
        self.url = url
        self._ids = {name: i for i, name in enumerate(names)}

    def rate(self, plan: Sequence[PlannedRequest], concurrency: int, *, counts_prompt: bool) -> float:
        """Send the requests, `concurrency` at a time; return output (or prompt) tokens per second.

        Raises LlamaUnavailable if one fails.
        """
        begin = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            tokens = sum(pool.map(self._complete, plan))
        seconds = time.perf_counter() - begin
        return (sum(len(request.prompt_ids) for request in plan) if counts_prompt else tokens) / seconds

    def _complete(self, request: PlannedRequest) -> int:
        body: dict[str, Any] = {
            "prompt": list(request.prompt_ids),
            "n_predict": request.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": [{"id": i, "scale": float(name == request.adapter)} for name, i in self._ids.items()],
        }
        answer = _post(f"{self.url}/completion", body)
        return int(answer["tokens_predicted"])


@contextmanager
def llama_server(
    binaries: Path, gguf: Path, adapters: Sequence[Path], scratch: Path, *, slots: int, slot_tokens: int, threads: int
) -> Iterator[LlamaServer]:
    """Quantize `gguf` to Q4_0, convert the adapters (PEFT folders), serve both on a free port; stop at the end.

    `binaries` holds llama-server and llama-quantize. Raises LlamaUnavailable.
    """
    model = scratch / "q4_0.gguf"
    if not model.exists():
        quantize = [str(binaries / "llama-quantize"), "--allow-requantize", str(gguf), str(model), "Q4_0"]
        done = subprocess.run(quantize, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LlamaUnavailable(f"llama-quantize failed: {done.stderr.strip()[-500:]}")
    port = free_port()
    command = [str(binaries / "llama-server"), "-m", str(model), "--port", str(port), "-t", str(threads)]
    command += ["-np", str(slots), "-c", str(slots * slot_tokens), "--no-webui", "--lora-init-without-apply"]
    for folder in adapters:
        command += ["--lora", str(convert(folder, scratch / f"{folder.name}.gguf"))]
    log = scratch / "llama-server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, f"{url}/health", log)
        yield LlamaServer(url, [folder.name for folder in adapters])
    finally:
        process.kill()
        process.wait()


def convert(folder: Path, out: Path) -> Path:
    """Write a PEFT folder as a LoRA file of llama.cpp."""
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - no mapping
            path = key.removeprefix("base_model.model.model.layers.")
            layer, _, rest = path.partition(".")
            module, _, factor = rest.removesuffix(".weight").rpartition(".lora_")
            name = f"blk.{layer}.{MODULES[module]}.weight.lora_{factor.lower()}"
            writer.add_tensor(name, file.get_tensor(key).float().half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LlamaUnavailable(f"llama-server ended with {process.returncode}: {log.read_text()[-500:]}")
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - http on loopback
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise LlamaUnavailable(f"llama-server was not up after {START_TIMEOUT:g} s")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310 - http on loopback
            found: dict[str, Any] = json.loads(answer.read())
            return found
    except urllib.error.HTTPError as error:
        raise LlamaUnavailable(f"llama-server answered {error.code}: {error.read().decode()[:300]}") from error

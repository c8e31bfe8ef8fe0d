"""What the hostile cases share. All load is bounded in count and time and goes to loopback only.

ROOT is the running server's --adapter-dir; TARGET, ADMIN and METRICS are its addresses. Exit codes: 0 right, 1 the
fault is there, 2 it cannot be tried here. Cases that need other flags or a log start a server of their own.
"""

import atexit
import json
import os
import shutil
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
from loramux.v1 import generation_pb2 as pb

TARGET = os.environ.get("TARGET", "127.0.0.1:50051")
ADMIN = os.environ.get("ADMIN", "127.0.0.1:50052")
METRICS = os.environ.get("METRICS", "127.0.0.1:9400")
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
LORAMUX = [sys.executable, "-c", "from loramux.cli import main; main()"]
SERVICE = "/loramux.v1.GenerationService/"


def scratch() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def weights(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def lora(name_a: str = LORA + "A.weight", value: float = 0.0) -> bytes:
    """A file of one LoRA of rank 2."""
    entry = {"dtype": "F32", "shape": [2, 576], "data_offsets": [0, 4608]}
    other = {"dtype": "F32", "shape": [576, 2], "data_offsets": [4608, 9216]}
    return weights({name_a: entry, LORA + "B.weight": other}, struct.pack("<f", value) * 2304)


def write(root: Path, name: str, content: bytes, config: dict | bytes = CONFIG) -> Path:
    """A new adapter folder; gone again at the end."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def call(method: str, target: str = TARGET):
    """A method on a connection of its own; takes serialized requests, so that building them disturbs no timing."""
    return grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]).unary_unary(SERVICE + method)


def outcome(work) -> str:
    try:
        work()
        return "OK"
    except grpc.RpcError as error:
        return f"{error.code().name} {(error.details() or '')[:100]}"


def flood(request: pb.GenerateRequest, copies: int, timeout: float) -> tuple[float, list[str]]:
    """Send copies of a request at once; the longest that GetModel took meanwhile (seconds), and the outcomes."""
    content, ask, waits, over = request.SerializeToString(), call("GetModel"), [], threading.Event()

    def watch() -> None:
        while not over.is_set():
            started = time.monotonic()
            ask(b"", timeout=120)
            waits.append(time.monotonic() - started)
            time.sleep(0.02)

    watching = threading.Thread(target=watch)
    watching.start()
    time.sleep(0.5)
    futures = [call("Generate").future(content, timeout=timeout) for _ in range(copies)]
    outcomes = [outcome(future.result) for future in futures]
    time.sleep(0.5)
    over.set()
    watching.join()
    return max(waits), outcomes

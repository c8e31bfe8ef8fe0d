"""What the real `loramux serve` process does when its device reports that it has failed for good, or has no memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loramux.client import Client
from loramux.errors import LoramuxError
from loramux.serve import DEVICE_LOST_STATUS

from tests.model.tiny import save_tiny
from tests.patience import PATIENCE
from tests.server.stack import save_adapter

# Steps of the engine with one of these tokens meet what a device would report.
NO_MEMORY, LOST = 13, 14
PROGRAM = f"""
import threading, torch
from loramux.model.causal_lm import CausalLM
plain = CausalLM.forward
def forward(self, inputs):
    if threading.current_thread().name == "loramux-engine":
        if {NO_MEMORY} in inputs.token_ids:
            raise torch.OutOfMemoryError("CUDA out of memory, seeded")
        if {LOST} in inputs.token_ids:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return plain(self, inputs)
CausalLM.forward = forward
from loramux.lora.adapter import Adapter
def build(*_, **__):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
Adapter.build = build
from loramux.cli import main
main()
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    flags = ["--model", str(model), "--device", "cpu", "--dtype", "fp32", "--kv-memory", "1MiB"]
    flags += ["--port", "0", "--admin-port", "0", "--metrics-port", "0", "--ports-file", str(tmp_path / "ports.json")]
    flags += ["--adapter-dir", str(save_adapter(tmp_path / "adapters" / "a", layers=1).parent)]
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", *flags],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("LORAMUX_")},
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def public_address(child: subprocess.Popen[str], ports: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not ports.exists():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    address: str = json.loads(ports.read_text())["public"]
    return address


def test_no_memory_fails_a_request_and_a_lost_device_ends_the_process(
    child: subprocess.Popen[str], tmp_path: Path
) -> None:
    """It stayed, failed every request and never recovered; nobody who starts processes again could see that."""
    with Client(public_address(child, tmp_path / "ports.json")) as client:
        with pytest.raises(LoramuxError) as short:
            client.generate(token_ids=[5, NO_MEMORY], max_new_tokens=2)
        assert (short.value.status, short.value.reason) == ("RESOURCE_EXHAUSTED", "DEVICE_MEMORY")
        assert client.generate(token_ids=[5], max_new_tokens=2, ignore_eos=True).usage.completion_tokens == 2
        with pytest.raises(LoramuxError) as lost:
            client.generate(token_ids=[5, LOST], max_new_tokens=2)
    assert (lost.value.status, lost.value.reason) == ("INTERNAL", "DEVICE_LOST")
    _, said = child.communicate(timeout=PATIENCE)
    assert child.returncode == DEVICE_LOST_STATUS
    assert "an illegal memory access was encountered" in said
    assert "The device has failed; only a new process can use it again." in said


def test_a_device_lost_where_an_adapter_is_loaded_ends_the_process(
    child: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Where all that is asked for has to be loaded first, no step of the engine's would ever meet the loss."""
    with Client(public_address(child, tmp_path / "ports.json")) as client, pytest.raises(LoramuxError) as lost:
        client.generate(token_ids=[5], adapter="a", max_new_tokens=2)
    assert (lost.value.status, lost.value.reason) == ("INTERNAL", "DEVICE_LOST")
    child.communicate(timeout=PATIENCE)
    assert child.returncode == DEVICE_LOST_STATUS

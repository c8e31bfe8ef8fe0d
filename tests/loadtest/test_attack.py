"""`python -m loadtest attack`, against a server of this process: what it tells, and which servers do not pass."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from loramux.v1 import generation_pb2, generation_pb2_grpc
from typer.testing import CliRunner

from loadtest.attacks import RESIDENT
from loadtest.cli import app
from loadtest.commands import attack
from loadtest.server_process import ServerAddress

LAST = "nobody-499"


class Victim(generation_pb2_grpc.GenerationServiceServicer):
    """Knows no adapter, and answers the last hostile request only when the bystander has felt the attack."""

    def __init__(self, good_ends: grpc.StatusCode) -> None:
        self.good_ends = good_ends
        self.models = self.good = 0

    async def GetModel(self, request: Any, context: Any) -> generation_pb2.GetModelResponse:
        self.models += 1
        return generation_pb2.GetModelResponse()

    async def Generate(self, request: Any, context: Any) -> generation_pb2.GenerateResponse:
        if request.adapter == LAST:
            models, good = self.models, self.good
            # Each of its threads counts an answer before it asks again; two send requests.
            while self.models < models + 2 or self.good < good + 3:
                await asyncio.sleep(0.01)
        if request.adapter:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such adapter")
        self.good += 1
        if self.good_ends != grpc.StatusCode.OK:
            await context.abort(self.good_ends, "it gave in")
        return generation_pb2.GenerateResponse()


@pytest.mark.parametrize(
    ("good_ends", "longest", "harmful"),
    [
        pytest.param(grpc.StatusCode.OK, math.inf, False, id="unharmed"),
        pytest.param(grpc.StatusCode.INTERNAL, math.inf, True, id="loses good requests"),
        pytest.param(grpc.StatusCode.OK, 0.0, True, id="lets GetModel wait"),
    ],
)
async def test_attack(
    good_ends: grpc.StatusCode, longest: float, harmful: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Victim(good_ends), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()

    @contextmanager
    def serve(arguments: list[str], folder: Path) -> Iterator[ServerAddress]:
        root = Path(arguments[arguments.index("--adapter-dir") + 1])
        assert (root / RESIDENT / "adapter_config.json").exists()
        assert arguments[arguments.index("--adapter") + 1] == RESIDENT
        yield ServerAddress(address, address, f"http://{address}/metrics", os.getpid())

    monkeypatch.setattr(attack, "serve", serve)
    monkeypatch.setattr(attack, "SETTLE", 0.0)
    monkeypatch.setattr(attack, "LONGEST", longest)
    report = tmp_path / "report.json"
    command = ["attack", "--only", "unknown adapter names", "--json", str(report)]
    try:
        ended = await asyncio.to_thread(CliRunner(env={"COLUMNS": "200"}).invoke, app, command)
    finally:
        await server.stop(None)
    assert ended.exit_code == harmful, ended.output
    found = json.loads(ended.stdout)
    assert json.loads(report.read_text()) == found
    (row,) = found["attacks"]
    assert (found["verdict"], found["harmful"]) == (("fail", [row["attack"]]) if harmful else ("pass", []))
    assert row["outcomes"] == {"NOT_FOUND": 500}
    assert row["good"] >= 1
    assert row["lost"] == ({} if good_ends == grpc.StatusCode.OK else {good_ends.name: row["good"]})
    assert row["longest_get_model_s"] > 0
    (shown,) = (line for line in ended.stderr.splitlines() if "500 NOT_FOUND" in line)
    cells = [cell.strip() for cell in shown.strip("│").split("│")]
    assert cells[0] == row["attack"] == "500 unknown adapter names"
    assert cells[3:5] == [f"{row['good']:,}", f"{sum(row['lost'].values()):,}"]

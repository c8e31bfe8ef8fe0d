"""Peers that are servers: what they are started with and sent, what is counted, what is told when they fail."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from loramux.model.loading import dequantized_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loadtest.cells import CELLS, Cell
from loadtest.commands.bench import measure_peer
from loadtest.console import ahead, show_cells
from loadtest.peers.llama_peer import LlamaPeer, library_path
from loadtest.peers.peer import Measured, PeerUnavailable
from loadtest.peers.vllm_peer import VllmPeer
from tests.model.tiny import save_tiny
from tests.server.stack import save_model

NAMES = tuple(f"a-{i:03}" for i in range(3))
BASE = Cell("base", 2, 0, prompt_len=5, output_len=20, rounds=2)
MIXED = Cell("mixed", 2, 3, prompt_len=5, output_len=20, rounds=3)
PREFILL = Cell("prefill", 2, 0, prompt_len=40, output_len=1, rounds=1, counts_prompt=True)
FAKE = Path(__file__).parent / "fake_vllm.py"


def script(file: Path, text: str) -> None:
    """Write an executable."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def vllm(tmp_path: Path) -> VllmPeer:
    """A peer whose server is the fake."""
    script(tmp_path / "venv/bin/vllm", f'#!/bin/sh\nexec {sys.executable} {FAKE} {tmp_path} "$@"\n')
    model = str(save_tiny("llama", tmp_path / "model"))
    adapters = [tmp_path / "adapters" / name for name in NAMES]
    cells = (BASE, MIXED, PREFILL)
    return VllmPeer(tmp_path / "venv", model, adapters, 16, tmp_path, cells, runs=2, slots=32, slot_tokens=1024)


def records(file: Path) -> list[dict[str, Any]]:
    """What the fake wrote."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_vllm_serves_the_base_without_lora_and_the_adapters_with(vllm: VllmPeer) -> None:
    measured = list(vllm.measure(seed=0))
    assert [cell for cell, _ in measured] == ["base", "prefill", "base", "prefill", "mixed", "mixed"]
    assert all(rate > 0 for _, rate in measured)
    base, lora = (start["arguments"] for start in records(vllm.scratch / "starts"))
    common = "--served-model-name base --dtype bfloat16 --max-model-len 1024 --max-num-seqs 32"
    for arguments in (base, lora):
        assert f"serve {vllm.scratch}/vllm-model {common} --no-enable-prefix-caching" in " ".join(arguments)
    assert "lora" not in " ".join(base)
    folders = " ".join(f"{name}={vllm.scratch}/adapters/{name}" for name in NAMES)
    assert f"--enable-lora --max-loras 3 --max-lora-rank 16 --lora-modules {folders}" in " ".join(lora)


def test_vllm_gets_the_planned_requests(vllm: VllmPeer) -> None:
    list(replace(vllm, cells=(MIXED,), runs=1).measure(seed=0))
    requests = records(vllm.scratch / "requests")
    warm, timed = requests[:3], requests[3:]
    assert {request["model"] for request in warm} == set(NAMES)
    assert len(timed) == 6
    assert [sum(request["model"] == name for request in timed) for name in NAMES] == [2, 2, 2]
    for request in timed:
        assert request["path"] == "/v1/completions"
        assert len(request["prompt"]) == 5
        assert all(type(token) is int for token in request["prompt"])
        assert (request["max_tokens"], request["temperature"], request["ignore_eos"]) == (20, 0, True)
    assert len({tuple(request["prompt"]) for request in requests}) == len(requests)


def test_the_base_goes_by_its_served_name(vllm: VllmPeer) -> None:
    list(replace(vllm, cells=(BASE,), runs=1).measure(seed=0))
    assert {request["model"] for request in records(vllm.scratch / "requests")} == {"base"}


def test_vllm_gets_our_processors_and_not_our_modules(vllm: VllmPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/our/own")
    list(replace(vllm, cells=(BASE,), runs=1).measure(seed=0))
    (start,) = records(vllm.scratch / "starts")
    assert start["variables"] == {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
    }


def test_a_rate_is_of_the_tokens_answered_or_prompted(vllm: VllmPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks once a look; the fake says that it generated one token less than asked for."""
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)
    rates = dict(replace(vllm, runs=1).measure(seed=0))
    assert rates == {"base": 4 * 19.0, "prefill": 2 * 40.0, "mixed": 6 * 19.0}


def test_what_a_server_started_ends_with_it(vllm: VllmPeer) -> None:
    measured = vllm.measure(seed=0)
    next(measured)
    (start,) = records(vllm.scratch / "starts")
    worker = psutil.Process(start["worker"])
    measured.close()
    deadline = time.monotonic() + 10
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_refused_request_is_told(vllm: VllmPeer, capsys: pytest.CaptureFixture[str]) -> None:
    peer = replace(vllm, adapters=[vllm.scratch / "refused", *vllm.adapters[1:]], runs=1)
    assert measure_peer(peer, seed=0).keys() == {"base", "prefill"}
    told = capsys.readouterr().err
    assert "/v1/completions answered 404" in told
    assert "The model `refused` does not exist." in told


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("echo '[/engine] no AVX512'; exit 3", "vllm: vllm ended with status 3 at start\n[/engine] no AVX512\n"),
        ("kill -ILL $$", "vllm: vllm ended with SIGILL at start\n"),
    ],
)
def test_the_bench_goes_on_without_a_peer_that_dies(
    ending: str, told: str, vllm: VllmPeer, capsys: pytest.CaptureFixture[str]
) -> None:
    script(vllm.venv / "bin/vllm", f"#!/bin/sh\n{ending}\n")
    assert measure_peer(vllm, seed=0) == {}
    assert told in capsys.readouterr().err


def test_what_was_measured_before_a_failure_stands(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        name = "failing"
        cells: Sequence[Cell] = (BASE,)
        runs = 3

        def measure(self, seed: int) -> Generator[Measured]:
            yield Measured("base", 1.0)
            yield Measured("base", 2.0)
            raise PeerUnavailable("it stopped")

    assert measure_peer(Failing(), seed=0) == {"base": [1.0, 2.0]}
    assert "failing: it stopped" in capsys.readouterr().err


def test_vllm_gets_the_weights_that_our_server_computes_with(vllm: VllmPeer) -> None:
    model = str(save_model(vllm.scratch / "model"))
    list(replace(vllm, cells=(BASE,), runs=1).measure(seed=0))
    (start,) = records(vllm.scratch / "starts")
    folder = start["arguments"][1]
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    written = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    ours = dequantized_model(model, torch.bfloat16).state_dict()
    assert written.keys() == ours.keys()
    assert all(torch.equal(written[name], ours[name]) for name in ours)
    ids, expected = (AutoTokenizer.from_pretrained(source)("a b")["input_ids"] for source in (folder, model))
    assert ids == expected


def test_libraries_without_links_get_them_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "libx.so.0.1").write_text("x")
    (binaries / "_symlinks.json").write_text(json.dumps({"libx.so": "libx.so.0", "libx.so.0": "libx.so.0.1"}))
    before = sorted(binaries.iterdir())
    links = tmp_path / "links"
    assert library_path(binaries, links) == f"{links}:{binaries}:/before"
    assert (links / "libx.so").read_text() == (links / "libx.so.0").read_text() == "x"
    assert sorted(binaries.iterdir()) == before


def test_libraries_with_their_links_need_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    (tmp_path / "bin").mkdir()
    assert library_path(tmp_path / "bin", tmp_path / "links") == f"{tmp_path}/links:{tmp_path}/bin"
    assert not list((tmp_path / "links").iterdir())


def test_llama_cpp_gets_its_libraries_and_tells_its_end(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    script(binaries / "llama-quantize", "#!/bin/sh\necho $LD_LIBRARY_PATH > ${0%/*}/../quantize\n")
    script(binaries / "llama-server", "#!/bin/sh\necho libraries: $LD_LIBRARY_PATH; exit 1\n")
    peer = LlamaPeer(binaries, tmp_path / "x.gguf", [], tmp_path, (BASE,), runs=1, slots=1, slot_tokens=64)
    with pytest.raises(PeerUnavailable, match=f"llama-server ended with status 1 at start\nlibraries: {tmp_path}"):
        next(peer.measure(seed=0))
    assert (tmp_path / "quantize").read_text().startswith(f"{tmp_path}/libraries:{binaries}")


def test_a_peer_is_ahead_only_if_it_is_faster() -> None:
    assert ahead(100.0, {"x": 90.0, "y": 100.0}) == ""
    assert ahead(100.0, {"x": 171.0, "y": 150.0}) == "x, 1.71 ×"
    assert ahead(100.0, {}) == ""


def test_the_table_names_who_is_ahead(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ours = {cell.name: [10.0, 200.0, 3000.0] for cell in CELLS}
    some = {"serve_c1_base": [300.0, 400.0, 100.0], "serve_c16_base": [100.0]}
    show_cells(CELLS, ours, {"llama.cpp": some, "vllm": {"prefill_a16": [1.0]}, "peft": {}})
    rows = {line.split()[1]: line for line in capsys.readouterr().err.splitlines() if line.startswith("│")}
    assert list(rows) == [cell.name for cell in CELLS]
    assert "llama.cpp, 1.50 ×" in rows["serve_c1_base"]
    assert "llama.cpp" not in rows["serve_c16_base"]
    assert rows["serve_c16_a16"].count("–") == 3

"""The benchmark's parts: what it sends, what it counts, and that its peers get the same work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.adapters import write_adapters
from loadtest.cells import CELLS
from loadtest.cli import main
from loadtest.commands.bench import line, one_run
from loadtest.kernels import kernels, limit
from loadtest.shapes import linear_shapes
from loadtest.target import Target
from loadtest.workload import plan
from tests.loadtest.fakes import VOCAB, Behaviour, serving

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def test_the_cells_have_the_names_that_dashboards_read() -> None:
    assert [cell.name for cell in CELLS] == [
        "serve_c1_base",
        "serve_c16_base",
        "serve_c16_a1",
        "serve_c16_a16",
        "serve_c32_a16",
        "prefill_base",
        "prefill_a16",
    ]


def test_a_prefill_cell_counts_prompts_and_a_decode_cell_answers() -> None:
    summary = {"total_input_tokens": 8192, "total_output_tokens": 16, "duration": 2.0}
    rates = {cell.name: cell.rate(summary) for cell in CELLS}
    assert rates["prefill_base"] == 4096.0
    assert rates["serve_c16_a16"] == 8.0


def test_no_prompt_comes_twice_in_a_run_of_all_cells() -> None:
    """Two cells, or two runs of one, with the same prompts for the same adapter: the second would find them cached."""
    names = tuple(f"a-{i:03}" for i in range(16))
    sent = [
        (request.adapter, tuple(request.prompt_ids))
        for cell in CELLS
        for seed in (0, 1)
        for request in plan(cell.workload(VOCAB, names, seed))
    ]
    assert len(sent) == len(set(sent)) > 500


async def test_a_run_sends_what_the_cell_says() -> None:
    cell = next(cell for cell in CELLS if cell.name == "serve_c16_a16")
    async with serving(Behaviour()) as at, Target(at.address, at.address) as target:
        names = tuple(f"a-{i:03}" for i in range(20))
        for name in names:
            at.fake.loaded[name] = f"uid of {name}"
        assert await one_run(target, cell, VOCAB, names, seed=0) > 0
        measured = at.fake.requests[-64:]
        assert at.fake.peak == 16
    assert {request.adapter for request in measured} == set(names[:16])
    assert {(len(r.token_ids.ids), r.sampling.max_new_tokens) for r in measured} == {(64, 64)}


async def test_a_run_with_failures_is_no_figure() -> None:
    cell = CELLS[1]
    async with serving(Behaviour(short_by=1)) as at, Target(at.address, at.address) as target:
        with pytest.raises(ValueError, match="serve_c16_base: 64 requests failed"):
            await one_run(target, cell, VOCAB, (), seed=0)


def test_a_line_is_the_median_and_its_runs() -> None:
    assert line("x", [3.0, 1.0, 2.0], "tokens/s") == {
        "bench": "x",
        "value": 2.0,
        "unit": "tokens/s",
        "runs": [3.0, 1.0, 2.0],
    }
    assert limit("x", "GB/s", 10**9, [0.5, 1.0, 2.0])["value"] == 1.0


def test_operations_are_measured_beside_their_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("loadtest.kernels.SHAPES", {"small": (64, (32, 16))})
    monkeypatch.setattr("loadtest.kernels.HEAD", (64, 100))
    found = {fields["bench"]: fields for fields in kernels(runs=1)}
    assert list(found) == [
        "small_m1",
        "small_m16",
        "small_m16_a16",
        "small_m256",
        "small_m256_a16",
        "head_m1",
        "head_m16",
    ]
    assert all(fields["value"] > 0 and fields["gflop_per_s"] >= 0 for fields in found.values())
    assert {"bitsandbytes_us", "reference_us"} <= found["small_m16"].keys()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--only everything", "--only takes kernels, served or all"),
        ("--llama-cpp /nowhere", "needs both --llama-cpp and --llama-gguf"),
        ("--llama-cpp /nowhere --llama-gguf /nothing", "there is no file /nowhere/llama-server"),
        ("--vllm /nowhere", "there is no file /nowhere/bin/vllm"),
        ("--runs 0", "should be greater than or equal to 1"),
    ],
)
def test_wrong_words_are_told_before_anything_is_measured(
    arguments: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loadtest", "bench", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_without_native_operations_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("LORAMUX_ISA", "none")
    with pytest.raises(ValueError, match="no native operations to measure: LORAMUX_ISA=none"):
        next(kernels(runs=1))


def test_llama_cpp_gets_every_factor(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import gguf

    from loadtest.peers.llama_peer import convert

    linears = linear_shapes(TINY)
    (folder,) = write_adapters(tmp_path, linears, count=1, ranks=[4])
    reader: Any = gguf.GGUFReader(convert(folder, tmp_path / "a.gguf"))
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    assert len(shapes) == 2 * len(linears)
    assert shapes["blk.1.ffn_down.weight.lora_a"] == (96, 4)  # gguf lists the innermost dimension first
    assert shapes["blk.0.attn_k.weight.lora_b"] == (4, 32)
    assert (
        reader.fields["adapter.lora.alpha"].contents()
        == json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    )

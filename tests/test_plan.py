"""`loramux plan`: published models' sizes, what is missing, the command line, and the table of docs/gpu.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from loramux import cli
from loramux.config import Settings
from loramux.model.kv_capacity import kv_blocks, room_for_one
from loramux.model.outline import Outline, outline
from loramux.plan import CUDA_CONTEXT, plan_outline
from loramux.values import Memory

from tests.plan_table import CONFIGS, table, written

# Parameters as their model cards and tensors' shapes have them, and bytes of keys and values a token in bf16:
# layers · 2 · key/value heads · dimensions of a head · 2.
PUBLISHED = {
    "llama-3.2-1b": (1_235_814_400, 16 * 2 * 8 * 64 * 2),
    "llama-3-8b": (8_030_261_248, 32 * 2 * 8 * 128 * 2),
    "qwen3-32b": (32_762_123_264, 64 * 2 * 8 * 128 * 2),
    "llama-3-70b": (70_553_706_496, 80 * 2 * 8 * 128 * 2),
}
GIB = 1 << 30
EIGHT = str(CONFIGS / "llama-3-8b.json")


@pytest.fixture(scope="module")
def eight() -> Outline:
    return outline(EIGHT, max_context=4096)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name: str) -> None:
    told = outline(str(CONFIGS / f"{name}.json"), max_context=4096)
    assert (told.facts.parameters, told.kv_bytes_per_token) == PUBLISHED[name]
    assert told.facts.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_every_byte_of_the_gpu_is_accounted_for(eight: Outline) -> None:
    settings = Settings(adapter_memory=3 * GIB, kv_memory=Memory(bytes=2 * GIB))
    plan = plan_outline(eight, settings, 24 * GIB, rank=16)
    parts = (plan.cuda_context_bytes, plan.nf4_bytes, plan.dense_bytes, plan.adapter_bytes, plan.step_bytes,
             plan.graphs_bytes, plan.kv_bytes, plan.unused_bytes)  # fmt: skip
    assert sum(parts) == 24 * GIB
    assert plan.kv_tokens == 2 * GIB // plan.kv_bytes_per_token
    free = 24 * GIB - CUDA_CONTEXT - eight.facts.nf4_bytes - eight.facts.dense_bytes
    assert plan.kv_tokens == 16 * kv_blocks(eight, settings, 16, free), "what the server would allocate"
    assert plan.sequences == 4, "of 4096 tokens"


def test_adapters_take_what_their_factors_do(eight: Outline) -> None:
    plan = plan_outline(eight, Settings(), 24 * GIB, rank=8)
    layer = 8 * (4096 + 4096) * 2 + 8 * (4096 + 1024) * 2 + 8 * (4096 + 14336) * 3  # q, o; k, v; gate, up, down
    assert plan.one_adapter_bytes == 32 * layer * 2
    assert plan.adapters == GIB // plan.one_adapter_bytes


@pytest.mark.parametrize("memory", [None, Memory(fraction=0.3), Memory(bytes=6 * GIB)])
@pytest.mark.parametrize("gpu", [GIB, 6 * GIB, 8 * GIB])
def test_with_what_is_missing_it_fits(memory: Memory | None, gpu: int, eight: Outline) -> None:
    settings = Settings(kv_memory=memory)
    without = plan_outline(eight, settings, gpu, rank=16)
    assert without.problem is not None
    assert without.kv_tokens == without.unused_bytes == 0
    enough = gpu + without.missing_bytes
    assert plan_outline(eight, settings, enough, rank=16).problem is None
    assert plan_outline(eight, settings, enough - 8, rank=16).problem is not None


def test_settings_change_the_plan_as_they_change_the_server(eight: Outline) -> None:
    def tokens(**given: int) -> int:
        return plan_outline(eight, Settings(**given), 24 * GIB, rank=16).kv_tokens

    assert tokens(adapter_memory=4 * GIB) < tokens()
    assert tokens(max_batch_tokens=8192) < tokens()
    assert tokens(max_batch_rows=4) == 4 * 4096
    assert outline(EIGHT, dtype="fp32").kv_bytes_per_token == 2 * eight.kv_bytes_per_token
    assert room_for_one(outline(EIGHT, max_context=8192), Settings(), 16) > room_for_one(eight, Settings(), 16)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["loramux", "plan", *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, EIGHT, "--gpu-memory", "24GiB") == 0
    shown = capsys.readouterr().out
    for part in (
        "8030.3 M parameters",
        "4.127 bits each",
        "12 adapters at once: 80.0 MiB each of rank 1",
        "sequences of",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--max-context", "80000"), "13 sequences of 8,192, the model's most (--max-context 80,000)"),
        (("--max-context", "8192", "--kv-memory", "1100MiB"), "1 sequence of 8,192 (--max-context)"),
        (("--kv-memory", "2GiB"), "--kv-memory takes no more"),
        (("--max-batch-rows", "1"), "--max-batch-rows lets no more be used"),
        ((), "a margin of 15% of what the KV cache could take (--kv-memory)"),
    ],
)
def test_the_table_explains_what_is_cut_and_what_is_left(
    words: tuple[str, ...], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, EIGHT, "--gpu-memory", "24GiB", *words) == 0
    assert part in capsys.readouterr().out


def test_the_embedded_models_name_is_a_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As it is for --model."""
    (tmp_path / "config.json").write_text((CONFIGS / "llama-3.2-1b.json").read_text())
    monkeypatch.setattr("loramux.model.outline.ensure_embedded", lambda name, convert: tmp_path)
    assert outline("smollm2").facts.parameters == PUBLISHED["llama-3.2-1b"][0]


def test_the_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], eight: Outline) -> None:
    words = (EIGHT, "--gpu-memory", "24GiB", "--json", "--rank", "64", "--max-batch-rows", "3")
    assert run(monkeypatch, *words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kv_tokens"] == 3 * 4096
    assert told["kv_bounded"] is True
    assert told["one_adapter_bytes"] == plan_outline(eight, Settings(), GIB, rank=64).one_adapter_bytes


def test_what_does_not_fit_is_a_sentence_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, EIGHT, "--gpu-memory", "4GiB", "--json") == 1
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["missing_bytes"] > 0
    assert shown.err == f"error: {told['problem']}\n"
    assert "do not fit into 4.00 GiB" in told["problem"]
    assert "GiB are missing" in told["problem"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((EIGHT, "--gpu-memory", "much"), "error: --gpu-memory: 'much' is not allowed; give a size such as 512MiB"),
        ((EIGHT, "--gpu-memory", "24"), "'24' is not allowed; give it a unit, such as 24GiB: 24 alone is a number of"),
        ((EIGHT, "--gpu-memory", "1GiB", "--rank", "0"), "error: --rank: '0' is not allowed; give a whole number from"),
        ((EIGHT, "--gpu-memory", "1GiB", "--kv-memory", "x"), "error: --kv-memory: 'x' is not allowed; give a size"),
        (("/no/where", "--gpu-memory", "1GiB"), "error: /no/where: there is no such file, or no config.json in it"),
        ((str(CONFIGS), "--gpu-memory", "1GiB"), "there is no such file, or no config.json in it"),
        ((__file__, "--gpu-memory", "1GiB"), "transformers cannot read test_plan.py"),
    ],
)
def test_bad_input_is_a_sentence_and_status_1(
    words: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert sentence in shown.err


def test_the_document_has_the_table_of_today() -> None:
    assert written() == table(), "python -m tests.plan_table"


def test_the_folder_of_a_model_is_as_good_as_its_config(tmp_path: Path, eight: Outline) -> None:
    (tmp_path / "config.json").write_text(Path(EIGHT).read_text())
    assert outline(str(tmp_path), max_context=4096).sites == eight.sites

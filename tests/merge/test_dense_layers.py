"""Merged weights served here: dense layers beside NF4 ones, without a branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loramux.errors import InvalidAdapter
from loramux.lora.delta import Delta
from loramux.lora.limits import ReadLimits
from loramux.lora.peft_files import read_adapter
from loramux.merge import Ingredient, merge
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.loading import load_model
from loramux.ops.site import Site

from tests.merge.recipes import PROMPT, STEPS, batched, dense, peft_adapter, relative
from tests.model.tiny import greedy_flat, save_tiny
from tests.server.stack import save_adapter, save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


def merged(base: Path, adapter: Path, dtype: str) -> CausalLM:
    def merging(sites: Sequence[Site], dense: Mapping[str, torch.Tensor]) -> Delta:
        return Delta([(read_adapter(adapter, sites, limits=ReadLimits()), 1.0)])

    return load_model(str(base), dtype=dtype, merging=merging).model


def answer(model: CausalLM) -> tuple[torch.Tensor, list[int]]:
    model.allocate_kv(32, 4)
    return model.forward(flat_inputs([(PROMPT, 0)], 4)).float(), greedy_flat(model, [PROMPT], STEPS)[0]


def test_merged_logits_are_the_batched_ones(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a")
    expected, greedy = batched(base, {adapter: 1.0})
    logits, text = answer(merged(base, adapter, "fp32"))
    assert relative(logits, expected) < 1e-4
    assert text == greedy
    # In bfloat16 both stay as near to the exact answer as the other does.
    in_batch = relative(batched(base, {adapter: 1.0}, "bf16")[0], expected)
    assert relative(answer(merged(base, adapter, "bf16"))[0], expected) < max(2 * in_batch, 2**-7)


def test_dora_merged_is_the_batched_one(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", use_dora=True)
    expected, greedy = batched(base, {adapter: 1.0})
    logits, text = answer(merged(base, adapter, "fp32"))
    assert relative(logits, expected) < 1e-4
    assert text == greedy
    in_batch = relative(batched(base, {adapter: 1.0}, "bf16")[0], expected)
    assert relative(answer(merged(base, adapter, "bf16"))[0], expected) < max(2 * in_batch, 2**-7)


def test_numbers_that_the_compute_type_cannot_hold_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", lora_alpha=1e8)
    with pytest.raises(InvalidAdapter, match=r"torch.float16 cannot hold; use --dtype bf16"):
        merged(base, adapter, "fp16")


def test_only_the_layers_that_change_are_dense(base: Path, tmp_path: Path) -> None:
    whole = load_model(str(base), dtype="bf16").model.facts
    adapter = save_adapter(tmp_path / "a", layers=1)
    facts = merged(base, adapter, "bf16").facts
    assert facts.parameters == whole.parameters
    changed = whole.quantized_parameters // 3
    assert whole.quantized_parameters - facts.quantized_parameters == changed
    assert facts.dense_bytes - whole.dense_bytes == 2 * changed
    assert facts.bits_per_weight == pytest.approx(whole.bits_per_weight)


def test_a_merged_folder_is_loaded_as_it_is(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a")
    merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp32")
    model = load_model(str(tmp_path / "out"), dtype="fp32").model
    logits, text = answer(model)
    theirs, greedy = dense(tmp_path / "out")
    assert relative(logits, theirs) < 1e-5
    assert text == greedy
    assert (model.facts.quantized_parameters, model.facts.bits_per_weight) == (0, 0.0)
    # And as the base of another merge.
    other = save_adapter(tmp_path / "b", seed=5)
    merge(str(tmp_path / "out"), [Ingredient("b", other)], tmp_path / "both", dtype="fp32")
    expected, _ = batched(base, {adapter: 1.0, other: 1.0})
    assert relative(dense(tmp_path / "both")[0], expected) < 1e-4


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_conv1d_layers(kind: dict[str, bool], tmp_path: Path) -> None:
    base = save_tiny("gpt2", tmp_path / "base")
    options: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
    } | kind
    adapter = peft_adapter(base, tmp_path / "a", **options)
    expected, greedy = batched(base, {adapter: 1.0})
    merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp32")
    for model in (merged(base, adapter, "fp32"), load_model(str(tmp_path / "out"), dtype="fp32").model):
        logits, text = answer(model)
        assert relative(logits, expected) < 1e-4
        assert text == greedy


def test_a_bias_needs_nothing_of_the_architecture_here(tmp_path: Path) -> None:
    base = save_tiny("mistral", tmp_path / "base")
    adapter = save_adapter(tmp_path / "a", bias=True, lora_bias=True)
    expected, greedy = batched(base, {adapter: 1.0})
    logits, text = answer(merged(base, adapter, "fp32"))
    assert relative(logits, expected) < 1e-4
    assert text == greedy

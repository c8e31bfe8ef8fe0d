"""What a config selects, by PEFT's own function; and what happens where it is not what the file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loramux.errors import InvalidAdapter
from loramux.lora import patterns
from loramux.lora.patterns import PathPattern
from loramux.lora.peft_config import parse_config
from loramux.lora.peft_files import read_adapter
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from tests.lora.folders import K0, LIMITS, Q0, SITES, V0, config, factors, write

MODULES = [
    *(site.name for site in SITES),
    *("model.layers.10.self_attn.q_proj", "layers.1.self_attn.q_proj", "transformer.h.1.attn.c_attn", "q_proj"),
    *("model.layers.1.experts.0.q_proj", "model.encoder.layers.0.self_attn.q_proj", "model.my_q_proj"),
]
SELECTIONS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "mlp.up_proj"]},
    {"target_modules": [Q0, "k_proj"]},
    {"target_modules": ["proj", "0.self_attn.q_proj"]},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r"^(?!.*mlp).*_proj$"},
    {"target_modules": r"q_proj"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj", "proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.0\..*"},
    {"target_modules": ["q_proj"], "exclude_modules": r"layers\.0"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 10]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0], "layers_pattern": ["experts"]},
    {"target_modules": [Q0, "k_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["self_attn"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["score", "q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": [r"layers\.1", "mlp.up"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": [r".*0"]},
]


@pytest.mark.parametrize("fields", SELECTIONS, ids=str)
def test_what_is_selected_is_what_peft_selects(fields: dict[str, Any]) -> None:
    selected = parse_config(json.dumps(config(**fields)).encode()).selection()
    oracle = LoraConfig(**fields)
    for module in MODULES:
        assert (selected.left_out_by([module]) is None) is bool(check_target_module_exists(oracle, module)), module


@pytest.mark.parametrize("targets", ["all-linear", "All-Linear", None])
def test_all_linear_and_nothing_select_everything(targets: str | None) -> None:
    selected = parse_config(json.dumps(config(target_modules=targets)).encode()).selection()
    assert all(selected.left_out_by([module]) is None for module in MODULES)


LESS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": ["q_proj", "k_proj"]},
    "a pattern": {"target_modules": r".*\.[qk]_proj"},
    "nothing": {"target_modules": []},
    "exclude_modules": {"exclude_modules": ["v_proj"]},
    "exclude_modules, a pattern": {"exclude_modules": r".*v_proj"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_to_transform beside all-linear": {"target_modules": "all-linear", "layers_to_transform": 1},
    "modules_to_save": {"modules_to_save": ["v_proj"]},
    "target_parameters": {"target_parameters": ["self_attn.v_proj.weight"]},
}


@pytest.mark.parametrize("name", LESS)
def test_a_config_that_selects_less_than_the_file_holds_is_refused_by_its_field(tmp_path: Path, name: str) -> None:
    """PEFT would leave the rest of the tensors out; all of them were applied once, in silence."""
    fields = LESS[name]
    write(tmp_path, factors(Q0, K0, V0), **fields)
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter(tmp_path, SITES, limits=LIMITS)
    assert caught.value.subject == next(reversed(fields))
    assert "_proj.lora_A" in caught.value.message


@pytest.mark.parametrize("prefix", ["base_model.model._orig_mod.", "_orig_mod.base_model.model.", "base_model.model."])
def test_a_module_that_any_of_its_paths_excludes_is_refused(tmp_path: Path, prefix: str) -> None:
    write(tmp_path, factors(Q0, prefix=prefix), exclude_modules=r"^model\.layers\.0\..*")
    with pytest.raises(InvalidAdapter, match="exclude_modules"):
        read_adapter(tmp_path, SITES, limits=LIMITS)


def test_all_but_the_language_model_may_be_excluded(tmp_path: Path) -> None:
    """By the paths of training, which have a segment that is gone here: every layer was said to be left out."""
    write(tmp_path, factors(Q0, prefix="base_model.model.language_model."), exclude_modules=r"^(?!language_model\.).*")
    assert len(read_adapter(tmp_path, SITES, limits=LIMITS).factors) == 1
    write(tmp_path, factors(Q0, prefix="base_model.model.language_model."), exclude_modules=r".*\.0\..*")
    with pytest.raises(InvalidAdapter, match="exclude_modules"):
        read_adapter(tmp_path, SITES, limits=LIMITS)


WRITTEN = (
    # Unsloth's and LLaMA-Factory's, for multimodal models: far from what may be tried in any number of steps.
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|"
    r"out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|"
    r"attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|"
    r"down_proj)))",
    r"^(?!.*(?:visual|merger|patch_embed)).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    r"(?:model\.)?layers(?:\.\d+)+\.(?:[a-z_]+\.)*[qkv]_proj",
)


@pytest.mark.parametrize("pattern", WRITTEN)
def test_patterns_that_trainers_write_are_matched(tmp_path: Path, pattern: str) -> None:
    files = read_adapter(write(tmp_path, factors(Q0), target_modules=pattern), SITES, limits=LIMITS)
    assert [f.site.name for f in files.factors] == [Q0]


def test_a_pattern_that_takes_for_ever_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a matcher that lets other threads run meanwhile."""
    monkeypatch.setattr(patterns, "_MATCHING_SECONDS", 0.0)
    hostile = r"((a|aa|[a-z.0-9_])+(b|bb|[a-z.0-9_])+)+\d"
    with pytest.raises(InvalidAdapter, match="very long to match"):
        read_adapter(write(tmp_path, factors(Q0), target_modules=hostile), SITES, limits=LIMITS)


@pytest.mark.parametrize("text", ["(", "a{2,1}", "(?P<a>x)(?P<a>y)", "[", "(" * 500 + ")" * 499])
def test_what_is_no_regular_expression_is_refused(text: str) -> None:
    with pytest.raises(InvalidAdapter, match="not a regular expression"):
        PathPattern("target_modules", text)


@pytest.mark.parametrize(("field", "value"), [("target_modules", "a" * 20_000), ("layers_pattern", ["(a+)+b"])])
def test_patterns_are_bounded(tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path, factors(Q0), **{field: value, "layers_to_transform": [0]})
    with pytest.raises(InvalidAdapter, match=field):
        read_adapter(tmp_path, SITES, limits=LIMITS)


def test_very_many_targets_and_layers_are_quick_to_look_through(tmp_path: Path) -> None:
    """A set each: so many names for each of the layers would be minutes of comparing."""
    targets = [f"x{i}" for i in range(20_000)] + ["q_proj"]
    write(tmp_path, factors(Q0), target_modules=targets, layers_to_transform=list(range(20_000)))
    assert len(read_adapter(tmp_path, SITES, limits=LIMITS).factors) == 1

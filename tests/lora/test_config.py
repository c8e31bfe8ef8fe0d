"""adapter_config.json: what is honoured, what is refused, and that each refusal names its field."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from loramux.errors import InvalidAdapter
from loramux.lora.patterns import PatternTable
from loramux.lora.peft_config import PeftConfig, parse_config
from loramux.lora.roots import CONFIG_FILE
from peft import LoraConfig

from tests.lora.folders import config


def parse(**fields: object) -> PeftConfig:
    return parse_config(json.dumps(config(**fields)).encode())


REFUSED: dict[str, list[object]] = {
    "peft_type": ["LOHA", "ADALORA", "lora"],
    "use_dora": ["yes", 1],
    "use_qalora": ["yes", 1],
    "layer_replication": [[[0, 4], [2, 5]]],
    "alora_invocation_tokens": [[], [5, 6]],
    "kasa_config": [{}, {"beta": 1e-4}],
    "arrow_config": [{}, {"top_k": 3}],
    "use_bdlora": [{}, {"nblocks": 2}],
    "init_lora_weights": [
        *("pissa", "PiSSA", "pissa_niter_16", "olora", "OLoRA", "corda", "corda_x", "loftq", "lora_ga", "LoRA-GA"),
        "something_new",
    ],
    "bias": ["some", True],
    "modules_to_save": ["classifier", {"score": 1}],
    "r": [0, -1, 1.5, True, "8", None, 2**40, 10**400],
    "lora_alpha": ["16", None, True, 1e308, -1e300, 10**400],
    "use_rslora": ["yes", 1],
    "lora_bias": ["no", 1],
    "rank_pattern": [
        [],
        "q_proj",
        {"q_proj": 0},
        {"q_proj": 2.5},
        {"q_proj": True},
        {"q_proj": "8"},
        {"(": 4},
        {"q": 10**400},
    ],
    "alpha_pattern": [{"q_proj": "8"}, {"q_proj": None}, {"q_proj": True}, {"q_proj": 1e308}, {"q_proj": -(10**400)}],
    "some_new_field": [True, 0.5, 0, "on", [1], {"a": 1}],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values], ids=repr
)
def test_refused_by_name(field: str, value: object) -> None:
    """Each would change what is computed in silence (SGLang ignored rsLoRA so, #40835)."""
    with pytest.raises(InvalidAdapter) as caught:
        parse(**{field: value})
    assert field in caught.value.message
    assert caught.value.reason in ("UNSUPPORTED_ADAPTER", "INVALID_CONFIG")


TYPES: dict[str, tuple[object, str]] = {
    "r": ("8", "r: is a whole number from 1 to 16777216, not '8'"),
    "lora_alpha": (1e308, "lora_alpha: is a number that fits into float32, at most 2**127, not 1e+308"),
    "use_dora": ("yes", "use_dora: is true or false, not 'yes'"),
    "init_lora_weights": (5, "init_lora_weights: is true, false or the name of an initialization, not 5"),
    "target_modules": (["q_proj", 5], "target_modules: is a list of names, or one pattern, not a list with 5"),
    "exclude_modules": ({"a": 1}, "exclude_modules: is a list of names, or one pattern, not {'a': 1}"),
    "layers_to_transform": ([1, 2.5], "layers_to_transform: is a whole number, or a list of them, not a list with 2.5"),
    "bias": ("some", "bias: is 'none', 'all' or 'lora_only', not 'some'"),
    "modules_to_save": ("lm_head", "modules_to_save: is a list of names, not 'lm_head'"),
    "peft_type": (["LORA"], "peft_type: is text, not ['LORA']"),
}


@pytest.mark.parametrize("field", TYPES)
def test_a_value_of_another_type_is_told_in_one_sentence(field: str) -> None:
    """In pydantic's words it was several, about types of Python."""
    value, sentence = TYPES[field]
    with pytest.raises(InvalidAdapter) as caught:
        parse(**{field: value})
    assert caught.value.message == f"{CONFIG_FILE}: {sentence}"


def test_several_values_of_other_types_are_told_at_once() -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parse(**{field: value for field, (value, _) in TYPES.items()})
    assert sorted(caught.value.message.removeprefix(f"{CONFIG_FILE}: ").split("; ")) == sorted(
        sentence for _, sentence in TYPES.values()
    )


def test_every_field_that_has_a_type_says_what_it_is() -> None:
    parsed_first = {"rank_pattern", "alpha_pattern"}
    typed = {name for name, field in PeftConfig.model_fields.items() if field.annotation is not Any} - parsed_first
    assert {name for name in typed if not PeftConfig.model_fields[name].description} == set()
    assert typed >= TYPES.keys()


WAYS_OUT: dict[str, tuple[dict[str, object], str]] = {
    "another method": ({"peft_type": "LOHA"}, "`save_as_lora(out, model, rank=...)`"),
    "replicated layers": ({"layer_replication": [[0, 4]]}, "train on the base as it is served"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "train with it unset"),
    "KaSA": ({"kasa_config": {}}, "train with it unset"),
    "Arrow": ({"arrow_config": {}}, "load those adapters one by one, or ask for a `mix` of them"),
    "block diagonal": ({"use_bdlora": {}}, "write them out as full lora_A and lora_B"),
    **{
        name: ({"init_lora_weights": name}, "path_initial_model_for_weight_conversion=initial")
        for name in ("pissa", "olora", "corda", "lora_ga")
    },
    "LoftQ": ({"init_lora_weights": "loftq"}, "train with init_lora_weights=true"),
    "unknown init": ({"init_lora_weights": "new"}, "set it to true if it was not"),
    "another spelling": ({"peft_type": "lora "}, "write it as 'LORA'"),
    "unknown field": ({"new": 1}, "remove those that do not, or update the server"),
    "DoRA with lora_bias": ({"use_dora": True, "lora_bias": True}, "train with lora_bias=false"),
    "DoRA with QA-LoRA": ({"use_dora": True, "use_qalora": True}, "train with one of the two"),
    "QA-LoRA with lora_bias": ({"use_qalora": True, "lora_bias": True}, "drop the lora_B.bias tensors"),
    "QA-LoRA without a size": ({"use_qalora": True}, "write the number that the adapter was trained with"),
    "QA-LoRA of one": ({"use_qalora": True, "qalora_group_size": 1}, "at least 2, not 1"),
    "QA-LoRA of a fraction": ({"use_qalora": True, "qalora_group_size": 4.0}, "not 4.0"),
}


@pytest.mark.parametrize(("fields", "way_out"), WAYS_OUT.values(), ids=WAYS_OUT.keys())
def test_a_refusal_tells_the_way_out(fields: dict[str, object], way_out: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parse(**fields)
    assert way_out in caught.value.message


@pytest.mark.parametrize(
    ("fields", "pooling"),
    [
        ({"use_dora": True}, 1),
        ({"use_dora": None, "use_qalora": None, "qalora_group_size": None}, 1),
        ({"use_qalora": False, "qalora_group_size": 16}, 1),  # what PEFT writes for every LoRA
        ({"use_qalora": True, "qalora_group_size": 16}, 16),
    ],
)
def test_pooling(fields: dict[str, object], pooling: int) -> None:
    assert parse(**fields).pooling == pooling


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        # A PiSSA, CorDA or LoRA-GA adapter that was converted keeps the initialization's config.
        {"init_lora_weights": True, "corda_config": {"corda_method": "ipm"}, "lora_ga_config": {"scale": "stable"}},
        {"lora_alpha": 11.313708498984761},  # what such a conversion writes with rslora
        {"modules_to_save": [], "trainable_token_indices": None, "target_parameters": [], "layer_replication": []},
        {"some_new_field": None},
        {"some_new_field": False, "another": "", "third": [], "fourth": {}},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}, "task_type": "CAUSAL_LM"},
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"exclude_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": 3, "target_modules": r".*\.q_proj", "fan_in_fan_out": True, "lora_dropout": 0.1},
        {"rank_pattern": None, "alpha_pattern": None},
        {"use_rslora": None, "lora_bias": None, "fan_in_fan_out": None, "ensure_weight_tying": None},
        {"lora_dropout": None},
        {"lora_dropout": "0.05"},  # nothing reads it
    ],
)
def test_honoured(fields: dict[str, object]) -> None:
    assert parse(**fields).r == 2


def test_every_field_of_peft_is_known() -> None:
    """A field of LoraConfig that we do not know would be refused with any value, or worse, ignored."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= PeftConfig.model_fields.keys()


def test_what_peft_writes_by_default_is_accepted() -> None:
    written = LoraConfig(target_modules=["q_proj"]).to_dict() | {"target_modules": ["q_proj"]}
    parsed = parse_config(json.dumps(written).encode())
    assert (parsed.r, parsed.lora_alpha) == (8, 8)


def test_the_defaults_are_those_of_peft() -> None:
    parsed, oracle = parse_config(b'{"peft_type": "LORA"}'), LoraConfig()
    for field in ("r", "lora_alpha", "use_rslora", "lora_bias", "bias", "fan_in_fan_out", "init_lora_weights"):
        assert getattr(parsed, field) == getattr(oracle, field), field


def test_megatron_core_is_never_imported() -> None:
    """PEFT imports the module that an adapter names here: code of the adapter's choosing."""
    import sys

    parse(megatron_config={"x": 1}, megatron_core="antigravity")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"{", "not valid JSON"),
        (b"[]", "list"),
        (b"null", "NoneType"),
        (b'{"r": 8}', "peft_type"),
        (b"\xff\xfe{}", "UTF-16"),
        ('{"r": 8}'.encode("utf-16-le"), "UTF-16"),
        (b"// a comment\n{}", "not JSON"),
        (b'{"error": "Repository not found"}', "fetch it again"),
        (b'{"r": 8, "a": "\xff"}', "not valid JSON"),
        (b'{"peft_type": null, "lora_alpha": 8}', 'add "peft_type": "LORA"'),
        (b'{"lora_parameters": {"rank": 8}, "fine_tune_type": "lora"}', "MLX"),
        (b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "whole model"),
        (b'{"peft_type": "LORA", "r": 2, "r": 200}', "'r' appears twice"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:32],
)
def test_broken_json(data: bytes, says: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parse_config(data)
    assert says in caught.value.message


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a*)*",
        "(.*a){20}",
        "a*a*a*a*a*a*a*b",
        "a?" * 30 + "a" * 30,
        "(.|.)" * 20 + "z",
        "x" * 600,
        ".*.*.*.*",
    ],
)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    """Python's matcher holds the interpreter's lock: one catastrophic pattern would stop every request."""
    with pytest.raises(InvalidAdapter, match="very long"):
        PatternTable.compile("rank_pattern", {pattern: 1})


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "^model.layers.0.self_attn.q_proj",
        "model.layers.10.mlp.down_proj",
        r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
        r".*\.(0|1|2|3|4|5|6|7)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"layers\.[0-9]+\.(self_attn\.)?q_proj",
        r"layers\.(?:1[0-9]|2[0-9])\..*_proj",
    ],
)
def test_patterns_that_people_write_are_taken(pattern: str) -> None:
    table = PatternTable.compile("rank_pattern", {pattern: 1})
    assert table.find(["base.model.layers.27.self_attn.some_longer_name.q_projection"], 0) == 0


def test_the_first_matching_pattern_decides() -> None:
    parsed = parse(rank_pattern={"0.self_attn.q_proj": 3, "q_proj": 5}, alpha_pattern={"self_attn.*": 7})
    assert parsed.rank_of("model.layers.0.self_attn.q_proj") == 3
    assert parsed.rank_of("model.layers.1.self_attn.q_proj") == 5
    assert parsed.rank_of("model.layers.1.self_attn.qq_proj") == 2
    assert parsed.scale_of(5, "model.layers.1.self_attn.q_proj") == 7 / 5
    assert parsed.scale_of(2, "model.layers.1.mlp.up_proj") == 2.0


def test_all_that_a_pattern_may_have_been_written_against_is_tried() -> None:
    """In the order of the paths: what PEFT saw in training decides, if any pattern matched it."""
    parsed = parse(rank_pattern={"^model.layers.0.+": 3, "^language_model.model.layers.0.+": 5})
    trained, here = "language_model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"
    assert parsed.rank_of(trained, here) == 5
    assert parsed.rank_of("model.language_model.layers.0.self_attn.q_proj", here) == 3
    assert parsed.rank_of("model.language_model.layers.1.self_attn.q_proj") == 2


def test_all_unknown_fields_are_named_at_once() -> None:
    """One a try made a user of another trainer load three times."""
    fields = {f"field_{i}": i + 1 for i in range(20)}
    with pytest.raises(InvalidAdapter) as caught:
        parse(**fields, known_to_be_unused=None)
    assert all(f"{field} ({value})" in caught.value.message for field, value in fields.items())
    assert "known_to_be_unused" not in caught.value.message


def test_all_that_is_refused_is_named_at_once() -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parse(kasa_config={}, arrow_config={}, init_lora_weights="pissa", peft_type="LOHA", new_field=1)
    assert all(
        word in caught.value.message
        for word in ("kasa_config", "arrow_config", "init_lora_weights", "peft_type", "new_field")
    )


def test_very_many_unknown_fields_are_one_short_message() -> None:
    with pytest.raises(InvalidAdapter, match="and 968 more") as caught:
        parse(**{f"field_{i}": "x" * 1000 for i in range(1000)})
    assert len(caught.value.message) < 10_000


def test_what_only_trainers_read_is_harmless() -> None:
    assert parse(lorap_lr_ratio=16.0, lorap_emb_lr=1e-6, swift_type="LORA", merge_weights=True, seed=1).r == 2
    with pytest.raises(InvalidAdapter, match="swift_type"):
        parse(swift_type="LONGLORA")


def test_without_peft_type_it_is_lora_if_it_looks_so() -> None:
    parsed = parse_config(b'{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}')
    assert (parsed.r, parsed.lora_alpha) == (4, 8)
    assert parse(peft_type=None).r == 2


def test_many_patterns_together_are_bounded() -> None:
    """Each alone would pass; ten thousand of them for each layer would hold a worker for hours."""
    with pytest.raises(InvalidAdapter, match="very long"):
        PatternTable.compile("rank_pattern", {f".*.*x{i}": 1 for i in range(1000)})


def test_a_pattern_for_every_module_of_a_large_model_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """EVA writes one for each; compiling them anew for each module, as PEFT does, would take minutes."""
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(80) for name in "qkvogud"]
    table = PatternTable.compile("rank_pattern", {module: index + 1 for index, module in enumerate(modules)})
    monkeypatch.setattr("re._compile", lambda *given: pytest.fail("compiled again"))
    assert [table.find([module], 0) for module in modules] == list(range(1, len(modules) + 1))

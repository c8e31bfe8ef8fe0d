"""What is served and hardly meant is told in a sentence; what is meant has none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loramux.errors import InvalidAdapter
from loramux.lora.base import NOTHING_KNOWN, Base
from loramux.lora.chat_template import own_chat_template, template_digest
from loramux.lora.peft_files import read_adapter
from loramux.lora.snapshot import measure
from torch import Tensor

from tests.lora.folders import LIMITS, Q0, SITES, factors, write
from tests.lora.test_read_adapter import run_advice

ALL_Q = [site.name for site in SITES if site.name.endswith("q_proj")]


def told(folder: Path, base: Base = NOTHING_KNOWN) -> tuple[str, ...]:
    return read_adapter(folder, SITES, limits=LIMITS, base=base).warnings


def zeroed(part: str, **kinds: bool) -> dict[str, Tensor]:
    return {key: torch.zeros_like(t) if part in key else t for key, t in factors(*ALL_Q, **kinds).items()}


def test_a_good_adapter_has_none(tmp_path: Path) -> None:
    assert told(write(tmp_path, factors(*ALL_Q), base_model_name_or_path="acme/base"), Base("acme/base")) == ()


NO_EFFECT: dict[str, tuple[dict[str, Tensor] | None, dict[str, Any]]] = {
    "alpha 0": (None, {"lora_alpha": 0}),
    "alpha_pattern 0": (None, {"alpha_pattern": {".*q_proj": 0}}),
    "alpha too small for float32": (None, {"lora_alpha": 1e-60}),
    "alpha too small to matter": (None, {"lora_alpha": -1e-30}),
    "denormal factors": ({k: t * 1e-39 for k, t in factors(*ALL_Q).items()}, {}),
    "B zero": (zeroed("lora_B"), {}),
    "A zero": (zeroed("lora_A"), {}),
    "B and its bias zero": (zeroed("lora_B", bias=True), {"lora_bias": True}),
}


@pytest.mark.parametrize(("tensors", "fields"), NO_EFFECT.values(), ids=NO_EFFECT.keys())
def test_no_effect(tmp_path: Path, tensors: dict[str, Tensor] | None, fields: dict[str, Any]) -> None:
    (warning,) = told(write(tmp_path, tensors or factors(*ALL_Q), **fields))
    assert "no effect" in warning


def test_no_effect_in_some_layers(tmp_path: Path) -> None:
    tensors = factors(*ALL_Q)
    tensors[f"base_model.model.{Q0}.lora_B.weight"].zero_()
    (warning,) = told(write(tmp_path, tensors))
    assert "1 of 2 layers" in warning


def test_a_bias_or_a_magnitude_has_an_effect(tmp_path: Path) -> None:
    tensors = {k: torch.zeros_like(t) if "lora_A" in k else t for k, t in factors(*ALL_Q, bias=True).items()}
    assert told(write(tmp_path / "bias", tensors, lora_bias=True)) == ()
    assert told(write(tmp_path / "dora", zeroed("lora_B.weight", dora=True), use_dora=True)) == ()


FEWER: dict[str, tuple[dict[str, Any], str]] = {
    "a target without tensors": ({"target_modules": ["q_proj", "k_proj"]}, "(k_proj, q_proj;"),
    "a layer without tensors": ({"target_modules": ["q_proj"]}, "for 1 of the 2 layers"),
    "all-linear": ({"target_modules": "all-linear"}, "for 13 of the 14 layers"),
    "a pattern": ({"target_modules": r".*\.[qv]_proj"}, "(q_proj, v_proj;"),
    "not set": ({"target_modules": None}, "not set"),
    "the output head": ({"target_modules": [Q0, "lm_head", "model.embed_tokens"]}, "embed_tokens, lm_head"),
}


@pytest.mark.parametrize(("fields", "says"), FEWER.values(), ids=FEWER.keys())
def test_fewer_layers_than_the_config_selects(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    """PEFT warns of missing keys as well."""
    (warning,) = told(write(tmp_path, factors(Q0), **fields))
    assert says in warning


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "w1", "query_key_value"]},  # no layers of this base
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": r"language_model\.model\..*q_proj"},
        {"target_modules": r"model\.layers.*q_proj"},
    ],
    ids=str,
)
def test_what_selects_no_more_than_there_is_has_no_warning(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert told(write(tmp_path, factors(*ALL_Q, prefix="base_model.model.language_model."), **fields)) == ()


def test_the_layers_that_are_missing_are_looked_for_under_the_paths_of_training(tmp_path: Path) -> None:
    targets = r"language_model\.model\.layers\.\d+\.self_attn\.[qk]_proj"
    (warning,) = told(write(tmp_path, factors(Q0, prefix="base_model.model.language_model."), target_modules=targets))
    assert "for 3 of the 4 layers" in warning


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    (warning,) = told(write(tmp_path, factors(*ALL_Q), alpha_pattern={"^layers.0": 64, "q_proj": 8}))
    assert "alpha_pattern has 1 patterns" in warning
    assert "^layers.0" in warning


@pytest.mark.parametrize(
    ("named", "served", "other"),
    [
        ("acme/base-7b", "acme/other-7b", True),
        ("acme/base-7b", "acme/base-7b", False),
        ("unsloth/Base-7B-bnb-4bit", "acme/base-7b", False),
        ("unsloth/llama-3-8b-Instruct-unsloth-bnb-4bit", "meta-llama/Meta-Llama-3-8B-Instruct", False),
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", True),
        ("/data/models/other", "acme/base-7b", False),
        ("acme/other", "/data/models/base", False),
        ("./runs/other", "acme/base-7b", False),
        ("", "acme/base-7b", False),
        (None, "acme/base-7b", False),
        (["acme/other"], "acme/base-7b", False),
    ],
)
def test_another_base_by_name(tmp_path: Path, named: object, served: str, other: bool) -> None:
    warnings = told(write(tmp_path, factors(*ALL_Q), base_model_name_or_path=named), Base(served))
    assert bool(warnings) is other
    assert all("was trained on" in warning for warning in warnings)


SWITCHES: dict[str, Any] = {
    "modules_to_save": ["classifier", "score"],
    "trainable_token_indices": {"embed_tokens": [1, 2]},
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "velora_config": {"num_groups": 4},
    "monteclora_config": {"num_samples": 8},
}


@pytest.mark.parametrize("field", SWITCHES)
def test_a_switch_without_its_tensors_is_plain_lora(tmp_path: Path, field: str) -> None:
    (warning,) = told(write(tmp_path, factors(*ALL_Q), **{field: SWITCHES[field]}))
    assert field in warning


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bias_without_bias_tensors_is_plain_lora(tmp_path: Path, bias: str) -> None:
    """PEFT writes none for a base without biases."""
    assert told(write(tmp_path, factors(*ALL_Q), bias=bias)) == ()


EMBEDDING = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
NORM = torch.ones(16)
KNOWN = Base(dense={"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": NORM})


def with_embedding(rows: Tensor, name: str = "model.embed_tokens") -> dict[str, Tensor]:
    return factors(*ALL_Q) | {f"base_model.model.{name}.weight": rows.contiguous()}


# As a trainer's own checkpoint has a module that PEFT trains as a whole.
WHOLE = ["model.embed_tokens.original_module", "model.embed_tokens.modules_to_save.default"]


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.embed_tokens.base_layer", "language_model.embed_tokens", *WHOLE]
)
def test_a_saved_embedding_that_is_the_bases_is_left_out(tmp_path: Path, name: str) -> None:
    write(tmp_path, with_embedding(EMBEDDING, name))
    assert told(tmp_path, KNOWN) == ()
    plain = write(tmp_path / "plain", factors(*ALL_Q))
    assert measure(tmp_path, 4, LIMITS) == measure(plain, 4, LIMITS)


@pytest.mark.parametrize("rows", [torch.cat([EMBEDDING, torch.randn(7, 16)]), EMBEDDING[:5]])
def test_a_saved_embedding_of_another_length_is_told(tmp_path: Path, rows: Tensor) -> None:
    (warning,) = told(write(tmp_path, with_embedding(rows)), KNOWN)
    assert f"{len(rows)} rows and the base 9" in warning


def test_a_saved_embedding_is_compared_in_the_precision_that_is_served(tmp_path: Path) -> None:
    base = Base(dense={"model.embed_tokens.weight": EMBEDDING.bfloat16()})
    assert told(write(tmp_path, with_embedding(EMBEDDING.bfloat16().float())), base) == ()


@pytest.mark.parametrize("base", [KNOWN, NOTHING_KNOWN])
@pytest.mark.parametrize(
    "tensors",
    [
        with_embedding(EMBEDDING + 1),
        with_embedding(EMBEDDING[:, :8]),
        with_embedding(torch.ones(9)),
        with_embedding(NORM * 2, "model.norm"),
        with_embedding(EMBEDDING, "lm_head"),
        with_embedding(EMBEDDING, "score.modules_to_save.default"),
    ],
)
def test_another_saved_tensor_is_refused_and_the_command_drops_it(
    tmp_path: Path, tensors: dict[str, Tensor], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, tensors)
    with pytest.raises(InvalidAdapter, match="drop it") as caught:
        told(tmp_path, base)
    run_advice(caught.value.message, tmp_path, monkeypatch)
    assert told(tmp_path, base) == ()


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_chat_template_of_its_own_is_told(tmp_path: Path) -> None:
    write(tmp_path, factors(*ALL_Q))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert told(tmp_path, Base(chat_template=f"{TEMPLATE}\r\n")) == ()
    for base in (Base(chat_template="{{ messages }}"), NOTHING_KNOWN):
        (warning,) = told(tmp_path, base)
        assert "chat template of its own" in warning


def test_a_chat_template_that_is_used_is_checked_at_load_and_no_warning(tmp_path: Path) -> None:
    write(tmp_path, factors(*ALL_Q))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    checked: list[str] = []
    files = read_adapter(tmp_path, SITES, limits=LIMITS, base=Base(check_template=checked.append))
    assert (files.chat_template, files.warnings, checked) == (TEMPLATE, (), [TEMPLATE])
    same = Base(chat_template=TEMPLATE, check_template=checked.append)
    assert read_adapter(tmp_path, SITES, limits=LIMITS, base=same).chat_template is None
    assert read_adapter(tmp_path, SITES, limits=LIMITS).chat_template is None

    def broken(template: str) -> None:
        raise InvalidAdapter("chat_template", "is no template")

    with pytest.raises(InvalidAdapter, match="chat_template"):
        read_adapter(tmp_path, SITES, limits=LIMITS, base=Base(check_template=broken))


@pytest.mark.parametrize(
    ("config", "template"),
    [
        ({"chat_template": TEMPLATE}, TEMPLATE),
        ({"added_tokens": [{"content": "x"}], "chat_template": 'a "quoted"\n'}, 'a "quoted"\n'),
        ({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": TEMPLATE}]}, TEMPLATE),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, None),
        ({"chat_template": None}, None),
        ({"chat_template": 5}, None),
        ({"chat_template": [5]}, None),
        ({"processor": {"chat_template": "a part's"}, "chat_template": TEMPLATE}, TEMPLATE),
        ({"chat_template": TEMPLATE, "processor": [{"chat_template": "a part's"}]}, TEMPLATE),
        ({"a": 'chat_template": "[{\\', "b": ["]}"], "processor": {"chat_template": "a part's"}}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_a_chat_template_in_a_config(tmp_path: Path, file: str, config: object, template: str | None) -> None:
    (tmp_path / file).write_text(json.dumps(config))
    assert own_chat_template(tmp_path) == template


def test_the_last_of_two_templates_counts_as_for_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "one", "chat_template": "two"}')
    assert own_chat_template(tmp_path) == "two"


def test_a_broken_config_beside_an_adapter_does_no_harm(tmp_path: Path) -> None:
    write(tmp_path, factors(*ALL_Q))
    (tmp_path / "tokenizer_config.json").write_bytes(b'{"chat_template": "\xff')
    assert told(tmp_path) == ()


def link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


LONG = "x" * ((1 << 20) + 1)


@pytest.mark.parametrize(
    ("file", "put", "why"),
    [
        ("chat_template.jinja", lambda path: path.write_text(LONG), "has 1048577 bytes; the limit is 1048576"),
        ("chat_template.jinja", os.mkdir, "is a folder"),
        ("chat_template.jinja", os.mkfifo, "is not a regular file"),
        ("chat_template.jinja", link_in_a_circle, "leads in a circle"),
        ("tokenizer_config.json", lambda path: path.write_text(LONG * 8), "bytes; the limit is 8388608"),
        (
            "tokenizer_config.json",
            lambda path: path.write_text(json.dumps({"chat_template": LONG})),
            "has a chat template of 1048579 characters; the limit is 1048576",
        ),
        (
            "chat_template.json",
            lambda path: path.write_text(json.dumps({"chat_template": [{"name": "default", "template": LONG}]})),
            "has chat templates that do not end within 1048576 characters",
        ),
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_a_chat_template_that_cannot_be_used_is_told(
    tmp_path: Path, file: str, put: Callable[[Path], object], why: str, used: bool
) -> None:
    """It was ignored in silence, and messages rendered with the base's."""
    write(tmp_path, factors(*ALL_Q))
    empty = template_digest(tmp_path)
    put(tmp_path / file)
    base = Base(check_template=lambda template: pytest.fail("it is not used")) if used else NOTHING_KNOWN
    (warning,) = told(tmp_path, base)
    assert warning.startswith("messages are rendered with the base's chat template, whatever its folder has: ")
    assert f"{file}: " in warning
    assert why in warning
    assert template_digest(tmp_path) != empty  # so that a folder that is mended is taken over

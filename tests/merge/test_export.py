"""What `merge` writes: the exact sum, rounded once, in a folder that transformers loads."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loramux import merge as merging
from loramux.errors import AdapterUnavailable, FolderExists, InvalidAdapter, InvalidRequest
from loramux.merge import Ingredient, merge
from loramux.quantize import quantize_to
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.merge.recipes import answers, batched, config_of, dense, peft_adapter, relative, scale_deltas
from tests.model.tiny import dense_copy, save_tiny
from tests.server.stack import save_adapter, save_model

# PEFT warns of lora_bias on layers without a bias, which is what some of these are about, and of a broken shard.
pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny base of a family, the same each time."""
    return functools.cache(lambda family: save_tiny(family, tmp_path_factory.mktemp(family)))


@pytest.mark.parametrize("padding", [0, 8])
def test_an_embedding_that_was_saved_unchanged_is_left_out(base: Path, tmp_path: Path, padding: int) -> None:
    """As where it is served: PEFT saves it by itself when the vocabulary was resized."""
    adapter = save_adapter(tmp_path / "adapter", seed=1)
    rows = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.weight"
    save_file(tensors | {key: torch.cat([rows, rows[:padding]])}, adapter / "adapter_model.safetensors")
    merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp32")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"], rows.float())
    save_file(tensors | {key: rows + 1}, adapter / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match="drop it"):
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "other", dtype="fp32")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "rank_pattern": {"q_proj": 7}}),
        ("llama", {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]}),
        ("qwen2", {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]}),
        ("gpt2", {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"r": 4, "lora_bias": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("qwen2", {"r": 3, "lora_alpha": 9, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": "all-linear"}),
        ("llama", {"r": 5, "use_dora": True, "use_rslora": True, "target_modules": ["o_proj", "up_proj"]}),
        ("qwen2", {"r": 3, "lora_alpha": 9, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
        ("gpt2", {"r": 8, "use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_every_weight_is_what_peft_merges(
    family: str, options: dict[str, object], families: Callable[[str], Path], tmp_path: Path
) -> None:
    base = families(family)
    adapter = peft_adapter(base, tmp_path / "adapter", **options)
    merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp32")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = PeftModel.from_pretrained(dense_copy(base), adapter).merge_and_unload().state_dict()
    assert ours.keys() <= theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    (logits, text), (expected, greedy) = dense(tmp_path / "out"), batched(base, {adapter: 1.0})
    assert relative(logits, expected) < 1e-4
    assert relative(logits, batched(base, {})[0]) > 0.01, "an adapter that changes nothing proves nothing"
    assert text == greedy


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": "all-linear", "use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}),
        ("llama", {"target_modules": "all-linear", "use_qalora": True, "qalora_group_size": 16}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_bias": True}),
        (
            "gpt2",
            {
                "target_modules": ["c_attn", "c_fc"],
                "fan_in_fan_out": True,
                "use_qalora": True,
                "qalora_group_size": 8,
            },
        ),
    ],
)
@pytest.mark.usefixtures("qalora_on_any_base")
def test_the_folder_answers_as_peft_does_unmerged(
    family: str, options: dict[str, object], families: Callable[[str], Path], tmp_path: Path
) -> None:
    base = families(family)
    adapter = peft_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8, **options)
    merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp32")
    logits, text = dense(tmp_path / "out")
    expected, greedy = answers(PeftModel.from_pretrained(dense_copy(base), adapter).eval())
    assert relative(logits, expected) < 1e-4
    assert relative(logits, answers(dense_copy(base))[0]) > 0.01
    assert text == greedy


def test_the_folder_answers_in_transformers_as_the_batch_does_here(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a")
    report = merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp32")
    logits, greedy = batched(base, {adapter: 1.0})
    theirs, text = dense(tmp_path / "out")
    assert text == greedy
    assert relative(theirs, logits) < 1e-4
    assert relative(theirs, batched(base, {})[0]) > 0.02, "an adapter that changes nothing proves nothing"
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hi") == AutoTokenizer.from_pretrained(base)("hi")
    assert report.overall < 1e-5


def test_qalora_is_merged_as_it_is_served(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a")
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_qalora": True, "qalora_group_size": 4}))
    tensors = load_file(weights)
    pooled = {k: t.unflatten(1, (-1, 4)).mean(dim=2) if "lora_A" in k else t for k, t in tensors.items()}
    save_file(pooled, weights)
    merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp32")
    logits, greedy = batched(base, {adapter: 1.0})
    theirs, text = dense(tmp_path / "out")
    assert text == greedy
    assert relative(theirs, logits) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [("bf16", 0.05), ("fp16", 0.005), ("fp32", 1e-6)],
)
def test_the_error_of_dora_is_of_its_whole_change(
    dtype: str, limit: float, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_ROWS", 48)  # several blocks, the last of another size
    adapter = save_adapter(tmp_path / "a", use_dora=True)
    report = merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    dense = dense_copy(base).state_dict()
    factors = load_file(adapter / "adapter_model.safetensors")
    assert len(report.layers) == 21
    for layer in report.layers:
        key, w = f"base_model.model.{layer.layer}", dense[f"{layer.layer}.weight"].double()
        b, a = factors[f"{key}.lora_B.weight"].double(), factors[f"{key}.lora_A.weight"].double()
        summed = w + 2.0 * b @ a
        exact = summed * (factors[f"{key}.lora_magnitude_vector"].double() / summed.norm(dim=1)).unsqueeze(1)
        assert layer.delta_norm == pytest.approx(float((exact - w).norm()), rel=1e-9)
        assert layer.base_norm == pytest.approx(float(w.norm()), rel=1e-9)
        error = float((written[f"{layer.layer}.weight"].double() - exact).norm())
        assert layer.error_norm == pytest.approx(error, rel=1e-6)
        assert layer.error <= limit


@pytest.mark.parametrize("mix", [{"dora": 0.5}, {"dora": 1.0, "plain": 0.5}, {"plain": 0.5, "dora": 1.0}])
def test_dora_in_a_mix_is_refused_with_the_way_out(mix: dict[str, float], base: Path, tmp_path: Path) -> None:
    folders = {"dora": save_adapter(tmp_path / "a", use_dora=True), "plain": save_adapter(tmp_path / "b")}
    with pytest.raises(InvalidRequest, match=r"'dora' is a DoRA adapter.*ask for it alone, with weight 1") as caught:
        merge(str(base), [Ingredient(n, folders[n], w) for n, w in mix.items()], tmp_path / "out")
    assert caught.value.field == f"mix[{list(mix).index('dora')}].adapter"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_magnitude_that_no_row_of_the_base_has_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] = 0.0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(tmp_path / "a", use_dora=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    factors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3] = 0.0
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match=r"layers.1.mlp.up_proj.lora_magnitude_vector: .* which is 0"):
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


def test_a_mix_is_the_weighted_sum(base: Path, tmp_path: Path) -> None:
    one, two = save_adapter(tmp_path / "one", rank=3, seed=1), save_adapter(tmp_path / "two", rank=8, seed=2)
    ingredients = [Ingredient("one", one, 0.7), Ingredient("two", two, -0.3)]
    report = merge(str(base), ingredients, tmp_path / "out", dtype="fp32")
    logits, greedy = batched(base, {one: 0.7, two: -0.3})
    theirs, text = dense(tmp_path / "out")
    assert text == greedy
    assert relative(theirs, logits) < 1e-4
    assert [(a.name, a.weight) for a in report.adapters] == [("one", 0.7), ("two", -0.3)]


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 0.20), ("fp16", 0.03), ("fp32", 1e-5)])
def test_the_error_at_one_percent_is_bounded_and_measured_on_what_was_written(
    dtype: str, limit: float, base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a")
    first = merge(str(base), [Ingredient("a", adapter)], tmp_path / "first", dtype="fp32")
    scale_deltas(adapter, {x.layer: 0.01 * x.base_norm / x.delta_norm for x in first.layers})
    report = merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype=dtype)
    for layer in report.layers:
        assert layer.delta_norm == pytest.approx(0.01 * layer.base_norm, rel=1e-3)
        assert layer.error <= limit, layer
    assert report.overall <= limit
    exact = load_file(merged_fp32(base, adapter, tmp_path) / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for layer in report.layers:
        name = f"{layer.layer}.weight"
        error = float((written[name].double() - exact[name].double()).norm())
        assert error == pytest.approx(layer.error_norm, rel=1e-3, abs=1e-5), "the report must be of the file"
    saved = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert saved["overall_error"] == report.overall
    assert [x["error"] for x in saved["layers"]] == [x.error for x in report.layers]
    assert len(saved["layers"]) == 21


def merged_fp32(base: Path, adapter: Path, tmp_path: Path) -> Path:
    merge(str(base), [Ingredient("a", adapter)], tmp_path / "exact", dtype="fp32")
    return tmp_path / "exact"


@pytest.mark.parametrize("target", ["o_proj", "down_proj"])
def test_a_bias_is_created_where_the_architecture_can_hold_one(target: str, base: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(base, tmp_path / "a", r=4, lora_alpha=8, lora_bias=True, target_modules=[target])
    report = merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp32")
    assert len(report.created_biases) == 3
    assert config_of(tmp_path / "out")[{"o_proj": "attention_bias", "down_proj": "mlp_bias"}[target]] is True
    logits, greedy = batched(base, {adapter: 1.0})
    theirs, text = dense(tmp_path / "out")
    assert text == greedy
    assert relative(theirs, logits) < 1e-4


def test_a_bias_that_the_architecture_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = save_tiny("mistral", tmp_path / "base")
    adapter = peft_adapter(base, tmp_path / "a", r=4, lora_bias=True, target_modules=["o_proj"])
    with pytest.raises(InvalidAdapter, match=r"MistralForCausalLM has no bias at 3 .* --merged"):
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


def test_numbers_that_fp16_cannot_hold_are_refused_and_nothing_is_left(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", lora_alpha=1e8)
    with pytest.raises(InvalidAdapter, match=r"torch.float16 cannot hold; use --dtype bf16"):
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_several_files_hold_the_same_as_one(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tmp_path / "a")
    merge(str(base), [Ingredient("a", adapter)], tmp_path / "one")
    monkeypatch.setattr(merging, "SHARD_BYTES", 50_000)
    seen: list[tuple[int, int]] = []
    report = merge(
        str(base),
        [Ingredient("a", adapter)],
        tmp_path / "many",
        progress=lambda done, total: seen.append((done, total)),
    )
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert max(f.stat().st_size for f in files) < 60_000
    many = {k: v for f in files for k, v in load_file(f).items()}
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert many.keys() == one.keys()
    assert all(torch.equal(many[k], one[k]) for k in one)
    assert report.bytes == sum(t.numel() * 2 for t in one.values())
    assert dense(tmp_path / "many")[1] == dense(tmp_path / "one")[1]
    assert seen == [(i, len(one)) for i in range(len(one) + 1)]


def test_a_weight_of_zero_is_the_base_and_divides_by_nothing(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a")
    report = merge(str(base), [Ingredient("a", adapter, 0.0)], tmp_path / "out")
    assert report.overall == math.inf
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["overall_error"] is None


def test_buffers_of_the_checkpoint_are_not_lost(tmp_path: Path) -> None:
    """gemma4 multiplies each layer's output with one, which is no parameter."""
    shape = {"sliding_window": 7, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
    base = save_tiny(
        "gemma4_text", tmp_path / "base", **shape, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    )
    weights = load_file(base / "model.safetensors")
    for i, name in enumerate(n for n in weights if n.endswith("layer_scalar")):
        weights[name] = torch.tensor([0.4 + 0.2 * i])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = peft_adapter(base, tmp_path / "a", r=4, target_modules=["q_proj", "down_proj"])
    merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", dtype="fp32")
    quantize_to(str(base), tmp_path / "nf4", lambda done, total: None)
    logits, greedy = batched(base, {adapter: 1.0})
    theirs, text = dense(tmp_path / "out")
    assert relative(theirs, logits) < 1e-4
    assert text == greedy
    assert relative(batched(tmp_path / "nf4", {adapter: 1.0})[0], logits) < 1e-2


def test_bad_places_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a")
    (tmp_path / "there").mkdir()
    with pytest.raises(FolderExists, match="name a new folder"):
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderExists):
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "link")
    with pytest.raises(InvalidRequest, match="make it first"):
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "no" / "parent")


def test_files_that_changed_since_their_digest_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a")
    with pytest.raises(AdapterUnavailable, match="load them with replace"):
        merge(str(base), [Ingredient("a", adapter, digest="sha256:0")], tmp_path / "out")


def test_a_folder_that_appears_meanwhile_is_not_written_over(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a")

    def progress(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").write_text("x")

    with pytest.raises(FolderExists):
        merge(str(base), [Ingredient("a", adapter)], tmp_path / "out", progress=progress)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]

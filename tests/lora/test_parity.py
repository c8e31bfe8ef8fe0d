"""What an adapter adds is what PEFT adds: s·B·A and s·bias against get_delta_weight, for saved adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loramux.errors import InvalidAdapter
from loramux.lora.adapter import Adapter
from loramux.lora.peft_files import read_adapter
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE
from loramux.lora.snapshot import measure
from loramux.ops.site import Site
from peft import LoraConfig, MontecloraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.lora.folders import LIMITS

# PEFT 0.21 uses a name that transformers 5 deprecates, takes every saved lora_B.bias for an ungathered shard, and
# warns of PiSSA beside another adapter, which is how it converts PiSSA itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),
]

CPU = torch.device("cpu")
LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    found: list[Site] = []
    for name, module in model.named_modules():
        if name == "lm_head":
            continue
        if isinstance(module, nn.Linear):
            found.append(Site(len(found), name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            found.append(Site(len(found), name, rows, columns, transposed=True))
    return tuple(found)


def randomized(model: nn.Module, **fields: Any) -> Any:
    """`model` with an adapter none of whose factors is zero (PEFT starts with B = 0)."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}
    peft = get_peft_model(model, LoraConfig(**defaults | fields))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return peft


def check_parity(peft: Any, folder: Path, sites: tuple[Site, ...], strip: str = "base_model.model.") -> Adapter:
    peft.save_pretrained(folder)
    files = read_adapter(folder, sites, limits=LIMITS)
    adapter = Adapter.build(files, sites, CPU, torch.float32)
    assert measure(folder, 4, LIMITS) == adapter.nbytes
    by_name = {site.name: site for site in sites}
    seen = set()
    for path, module in peft.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        site = by_name[path.removeprefix(strip)]
        mine = adapter.weights[site.index]
        delta = module.get_delta_weight("default")
        torch.testing.assert_close(mine.b @ mine.a, delta.T if site.transposed else delta, rtol=1e-5, atol=1e-6)
        bias = module.lora_B["default"].bias
        if bias is None:
            assert mine.bias is None
        else:
            torch.testing.assert_close(mine.bias, bias * module.scaling["default"])
        assert adapter.ranks[site.index] == module.r["default"]
        seen.add(site.index)
    assert seen == set(adapter.weights), "a target that is missing in one layer must not be dropped or invented"
    assert seen
    return adapter


CONFIGS: dict[str, dict[str, Any]] = {
    "r=1": {"r": 1},
    "r=3": {"r": 3, "lora_alpha": 5},
    "r=8": {"r": 8},
    "r above the width": {"r": 200},
    "rslora": {"r": 8, "use_rslora": True},
    "all linear": {"target_modules": "all-linear"},
    "regex target": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "rank_pattern": {"rank_pattern": {"q_proj": 5, r"layers\.[12]\.self_attn\.v_proj": 1}},
    "rank_pattern, first wins": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "q_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 32, "model.layers.2.self_attn.q_proj": 1}},
    "both patterns and rslora": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 2, "q_proj": 3},
    },
    "layers_to_transform": {"layers_to_transform": [1]},
    "one layer": {"layers_to_transform": 2, "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "dropout": {"lora_dropout": 0.2},
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_llama(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = LlamaForCausalLM(LLAMA)
    sites = sites_of(model)
    check_parity(randomized(model, **fields), tmp_path, sites)


ANCHORED = {
    "alpha_pattern": {r"^model\.layers\.[01]\.self_attn\.q_proj": 64},
    "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 5},
    "exclude_modules": r"^model\.layers\.2\..*",
    "target_modules": r"^model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.up_proj)$",
}
# What came before, in or behind PEFT's prefix when the file was saved: the key as PEFT writes it → as it is there.
REWRITTEN = {
    "as PEFT writes it": ("", ""),
    "compiled": ("base_model.", "_orig_mod.base_model."),
    "DistributedDataParallel": ("base_model.", "module.base_model."),
    "both": ("base_model.", "module._orig_mod.base_model."),
    "Fabric": ("base_model.", "_forward_module.base_model."),
    "the inner model compiled": ("base_model.model.", "base_model.model._orig_mod."),
    "FSDP inside": ("base_model.model.", "base_model._fsdp_wrapped_module.model._fsdp_wrapped_module."),
    "FSDP, every layer": (".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."),
    "a layer compiled": (".mlp.", "._orig_mod.mlp."),
    "a linear compiled": (".lora_", "._orig_mod.lora_"),
    "multimodal, a tower inside": ("base_model.model.model.", "base_model.model.model.language_model."),
    "multimodal, another name": ("base_model.model.model.", "base_model.model.model.text_model."),
    "multimodal, around": ("base_model.model.model.", "base_model.model.language_model.model."),
    "all together": ("base_model.model.model.", "module.base_model.model._orig_mod.model.language_model."),
}


@pytest.mark.parametrize(("old", "new"), REWRITTEN.values(), ids=REWRITTEN.keys())
def test_wrapped_keys_give_what_plain_ones_do(tmp_path: Path, old: str, new: str) -> None:
    """A prefix that was left in the keys made anchored patterns miss: the wrong scale, in silence."""
    model = LlamaForCausalLM(LLAMA)
    sites = sites_of(model)
    plain = check_parity(randomized(model, **ANCHORED), tmp_path, sites)
    tensors = {key.replace(old, new, 1) if old else key: t for key, t in load_file(tmp_path / WEIGHTS_FILE).items()}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    files = read_adapter(tmp_path, sites, limits=LIMITS)
    wrapped = Adapter.build(files, sites, CPU, torch.float32)
    assert files.warnings == ()
    assert torch.equal(wrapped.offsets, plain.offsets)
    assert torch.equal(wrapped.buffer, plain.buffer)


@pytest.mark.parametrize("inner", ["_orig_mod.", "language_model."])
def test_patterns_may_be_written_against_the_path_that_peft_saw(tmp_path: Path, inner: str) -> None:
    """PEFT on a compiled or a multimodal model matches its patterns with the whole path in that."""
    model = LlamaForCausalLM(LLAMA)
    sites = sites_of(model)
    plain = check_parity(randomized(model, **ANCHORED), tmp_path, sites)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({k.replace(".model.model.", f".model.{inner}model.", 1): t for k, t in tensors.items()}, tmp_path / "w")
    (tmp_path / "w").rename(tmp_path / WEIGHTS_FILE)
    config = (tmp_path / CONFIG_FILE).read_text()
    (tmp_path / CONFIG_FILE).write_text(config.replace("^model", "^" + inner.replace(".", "\\\\.") + "model"))
    wrapped = Adapter.build(read_adapter(tmp_path, sites, limits=LIMITS), sites, CPU, torch.float32)
    assert torch.equal(wrapped.buffer, plain.buffer)


def test_what_needs_tensors_of_its_own_and_has_none_is_what_peft_computes(tmp_path: Path) -> None:
    """bias on a base without biases, and a head that a causal model does not have."""
    sites = sites_of(model := LlamaForCausalLM(LLAMA))
    fields: dict[str, Any] = {"bias": "all", "modules_to_save": ["classifier", "score"]}
    check_parity(randomized(model, **fields), tmp_path, sites)


@pytest.mark.parametrize(
    "fields", [{}, {"r": 1}, {"use_rslora": True, "rank_pattern": {"c_proj": 5}}, {"lora_bias": True}]
)
def test_conv1d(tmp_path: Path, fields: dict[str, Any]) -> None:
    """GPT-2 stores its weights [in, out]; A and B have the usual shapes all the same.

    Its linears have biases.
    """
    model = GPT2LMHeadModel(GPT2)
    sites = sites_of(model)
    fields = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} | fields
    adapter = check_parity(randomized(model, **fields), tmp_path, sites)
    assert adapter.target_modules == ("c_attn", "c_proj")
    assert any(weights.bias is not None for weights in adapter.weights.values()) is fields.get("lora_bias", False)


def test_lora_bias_with_patterns(tmp_path: Path) -> None:
    """The bias of B is scaled by the same factor as B·A, by this site's own rank and alpha."""
    model = LlamaForCausalLM(LlamaConfig(**LLAMA.to_dict() | {"attention_bias": True}))
    fields = {"lora_bias": True, "use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 20}}
    sites = sites_of(model)
    check_parity(randomized(model, **fields), tmp_path, sites)


def test_trained_on_the_bare_model(tmp_path: Path) -> None:
    """AutoModel has no "model." in front of its modules."""
    sites = sites_of(LlamaForCausalLM(LLAMA))
    peft = randomized(AutoModel.from_config(LLAMA), rank_pattern={"^layers.0.self_attn.q_proj": 4})
    peft.save_pretrained(tmp_path)
    adapter = Adapter.build(read_adapter(tmp_path, sites, limits=LIMITS), sites, CPU, torch.float32)
    q0 = next(site for site in sites if site.name == "model.layers.0.self_attn.q_proj")
    expected = peft.base_model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    mine = adapter.weights[q0.index]
    assert adapter.site_count == 6
    assert mine.a.shape == (4, 32)
    torch.testing.assert_close(mine.b @ mine.a, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_files_and_half_compute(tmp_path: Path, dtype: torch.dtype) -> None:
    """The scale is folded in fp32 and rounded once, so each number is the nearest one to PEFT's."""
    model = LlamaForCausalLM(LLAMA)
    sites = sites_of(model)
    peft = randomized(model, lora_alpha=7, r=3).to(dtype)
    peft.save_pretrained(tmp_path)
    adapter = Adapter.build(read_adapter(tmp_path, sites, limits=LIMITS), sites, CPU, dtype)
    for path, module in peft.named_modules():
        if hasattr(module, "get_delta_weight"):
            site = next(site for site in sites if f"base_model.model.{site.name}" == path)
            mine = adapter.weights[site.index]
            assert torch.equal(mine.a, module.lora_A["default"].weight)
            assert torch.equal(mine.b, (module.lora_B["default"].weight.float() * (7 / 3)).to(dtype))


def test_pissa_is_refused_and_its_conversion_is_served(tmp_path: Path) -> None:
    """The way out that the refusal names must work: the conversion, on the original base, is what was trained."""
    original = LlamaForCausalLM(LLAMA)
    sites = sites_of(original)
    weights = {name: parameter.detach().clone() for name, parameter in original.named_parameters()}
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], init_lora_weights="pissa")
    peft: Any = get_peft_model(original, config)
    peft.save_pretrained(tmp_path / "initial")
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1  # "training"
    peft.save_pretrained(tmp_path / "raw")
    with pytest.raises(InvalidAdapter, match="path_initial_model_for_weight_conversion"):
        read_adapter(tmp_path / "raw", sites, limits=LIMITS)
    initial = str(tmp_path / "initial")
    peft.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    adapter = Adapter.build(read_adapter(tmp_path / "plain", sites, limits=LIMITS), sites, CPU, torch.float32)
    for site in (site for site in sites if site.index in adapter.weights):
        mine = adapter.weights[site.index]
        module = peft.get_submodule(f"base_model.model.{site.name}")
        trained = module.base_layer.weight + module.get_delta_weight("default")
        torch.testing.assert_close(weights[f"{site.name}.weight"] + mine.b @ mine.a, trained, rtol=1e-4, atol=1e-5)


def test_monteclora_is_refused_and_is_plain_lora_without_its_sampler(tmp_path: Path) -> None:
    """The way out that the refusal names: in inference PEFT samples nothing."""
    sites = sites_of(model := LlamaForCausalLM(LLAMA))
    peft = randomized(model, monteclora_config=MontecloraConfig())
    peft.save_pretrained(tmp_path)
    with pytest.raises(InvalidAdapter, match="drop the lora_monteclora_sampler tensors"):
        read_adapter(tmp_path, sites, limits=LIMITS)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({k: t for k, t in tensors.items() if "lora_monteclora_sampler" not in k}, tmp_path / WEIGHTS_FILE)
    adapter = Adapter.build(read_adapter(tmp_path, sites, limits=LIMITS), sites, CPU, torch.float32)
    site = next(site for site in sites if site.name == "model.layers.1.self_attn.q_proj")
    module, mine = peft.get_submodule(f"base_model.model.{site.name}").eval(), adapter.weights[site.index]
    x = torch.randn(5, site.in_features)
    torch.testing.assert_close(module(x), module.base_layer(x) + x @ mine.a.T @ mine.b.T, rtol=1e-4, atol=1e-5)

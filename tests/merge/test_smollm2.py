"""A shipped adapter merged into the embedded model: the real thing, once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loramux.lora.adapter import Adapter
from loramux.lora.delta import Delta
from loramux.lora.limits import ReadLimits
from loramux.lora.peft_files import read_adapter
from loramux.merge import Ingredient, merge
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.loading import load_model
from loramux.ops.segment import AdapterWeights, Segment
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.merge.recipes import relative

ADAPTERS = Path(__file__).parents[2] / "adapters"
PROMPT = "Write this date in ISO 8601: the 3rd of March, 2021"
STEPS = 12


def greedy(model: CausalLM, prompt: list[int], weights: AdapterWeights | None) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt, and what follows it."""
    model.allocate_kv(32, 16)
    tokens, cached, first = list(prompt), 0, None
    for _ in range(STEPS):
        rows = [] if weights is None else [Segment(0, len(tokens) - cached, 1.0, weights)]
        logits = model.forward(flat_inputs([(tokens, cached)], 16, rows, "all", 512)).float()
        first = logits if first is None else first
        cached = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    assert first is not None
    return first, tokens[len(prompt) :]


@pytest.mark.timeout(120)
def test_a_shipped_adapter(tmp_path: Path) -> None:
    folder = ADAPTERS / "date"
    merge("smollm2", [Ingredient("date", folder)], tmp_path / "out", dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    exact, expected = by_transformers(tmp_path / "out", prompt)
    assert tokenizer.decode(expected, skip_special_tokens=True).startswith("2021-03-03")
    batched = load_model("smollm2", dtype="bf16").model
    files = read_adapter(folder, batched.sites, limits=ReadLimits())
    weights = Adapter.build(files, batched.sites, batched.device, batched.dtype).weights
    in_batch, text = greedy(batched, prompt, weights)
    merged = load_model("smollm2", dtype="bf16", merging=lambda sites, dense: Delta([(files, 1.0)])).model
    in_base, answer = greedy(merged, prompt, None)
    assert text[: len(expected)] == answer[: len(expected)] == expected
    assert relative(in_batch, exact) < 0.1
    assert relative(in_base, exact) < 1.25 * relative(in_batch, exact), "two roundings to bfloat16 of the same sum"
    assert relative(greedy(batched, prompt, None)[0], exact) > 4 * relative(in_batch, exact), "the adapter is felt"


@torch.inference_mode()
def by_transformers(folder: Path, prompt: list[int]) -> tuple[torch.Tensor, list[int]]:
    """The same by transformers, to the end of the text at most."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False, pad_token_id=0
    )
    return model(ids).logits[0], out[0, len(prompt) :].tolist()

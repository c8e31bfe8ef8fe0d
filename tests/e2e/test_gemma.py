"""gemma-3-270m, which has one key/value head, served from its GGUF file by the native operations: each token is the one
that transformers and PEFT choose in float32 on the same dequantized weights.

`make gemma` fetches the file (230 MB) and runs this; without LORAMUX_TEST_GEMMA, which names it, nothing runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from loramux.client import AsyncClient
from loramux.demo import serving
from loramux.model.loading import dequantized_model
from loramux.model.sources import TensorSource, open_source
from loramux.ops.cpu.build import supported_isas
from loramux.ops.select import select_backend
from peft import LoraConfig, PeftModel, get_peft_model

FILE = os.environ.get("LORAMUX_TEST_GEMMA", "")
pytestmark = [
    pytest.mark.skipif(not FILE, reason="LORAMUX_TEST_GEMMA names no gemma-3-270m .gguf (see `make gemma`)"),
    pytest.mark.timeout(3600),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]
ADAPTER = "random"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Photosynthesis is the process by which",
    "1, 2, 3, 4, 5,",
    "Die Hauptstadt von Deutschland ist",
    "In 1969, the first humans",
    "To make a good cup of tea, first",
    "The three states of matter are",
    'Translate to Spanish: "Good morning" →',
)


@dataclass
class Judge:
    """transformers in float32 on the weights that are served: what is in NF4 dequantized, the rest rounded to bf16."""

    source: TensorSource
    model: Any

    def gaps(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """By how much each token's logit is below the first choice's, in units of bfloat16's last place there; every
        token is judged after those that were served before it."""
        logits = self.model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        first = logits.amax(1)
        units = torch.exp2(first.abs().log2().floor() - 7)
        return (first - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]) / units


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, judge: Judge) -> Path:
    """A root with one random adapter, r=16 on all linear layers, as PEFT saves it."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(judge.model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.01
        if "lora_" in name:  # what is served in bfloat16
            parameter.data = parameter.data.to(torch.bfloat16).float()
    model.save_pretrained(root / ADAPTER, save_embedding_layers=False)
    model.unload()
    return root


@pytest.fixture(scope="module")
def judge() -> Judge:
    source = open_source(FILE)
    model = dequantized_model(source, torch.float32)
    sites = tuple(f"{name}.weight" for name in TARGETS)
    for name, parameter in model.named_parameters():
        if not name.endswith(sites):
            parameter.data = parameter.data.to(torch.bfloat16).float()
    return Judge(source, model)


@dataclass(frozen=True)
class Served:
    """Answers of the base and of the adapter, the ids of each prompt, and what GetModel says."""

    base: list[Any]
    adapter: list[Any]
    tokens: list[list[int]]
    model: Any


@pytest.fixture(scope="module")
def served(adapters: Path) -> Iterator[Served]:
    async def ask(target: str) -> Served:
        async with AsyncClient(target) as client:

            async def answers(name: str) -> list[Any]:
                options = {"adapter": name, "max_new_tokens": TOKENS, "ignore_eos": True, "logprobs": True}
                return await asyncio.gather(*(client.generate(prompt=p, **options) for p in PROMPTS))

            base, adapted = await asyncio.gather(answers(""), answers(ADAPTER))  # one mixed batch
            tokens = [await client.tokenize(p) for p in PROMPTS]
            return Served(base, adapted, tokens, await client.model())

    with serving(FILE, adapters, [ADAPTER]) as ports:
        yield asyncio.run(ask(ports["public"]))


def test_it_is_the_text_model_on_the_native_path(served: Served) -> None:
    assert served.model.architecture == "Gemma3ForCausalLM"
    if supported_isas():
        assert select_backend(torch.device("cpu"), torch.bfloat16).name.startswith("native")


def test_prompts_are_the_tokens_of_the_files_tokenizer(served: Served, judge: Judge) -> None:
    tokenizer: Any = judge.source.tokenizer
    assert served.tokens == [tokenizer(prompt).input_ids for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["", ADAPTER])
def test_each_token_is_the_greedy_choice(name: str, served: Served, judge: Judge, adapters: Path) -> None:
    """Or tied with it: within two units of bfloat16, in which both logits are rounded. Ties are rare."""
    tokenizer: Any = judge.source.tokenizer
    model = PeftModel.from_pretrained(judge.model, adapters / name) if name else judge.model
    ties = 0
    for prompt, answer in zip(PROMPTS, served.adapter if name else served.base, strict=True):
        ids = list(answer.completions[0].token_ids)
        assert len(ids) == TOKENS
        gaps = Judge(judge.source, model).gaps(tokenizer(prompt).input_ids, ids)
        tied = int((gaps > 0).sum())
        print(f"\n{name or 'base'}: {tied} of {TOKENS} tied, by {float(gaps.max()):.2f} units: {answer.text!r}", end="")
        assert float(gaps.max()) <= 2, prompt
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
        ties += tied
    assert ties <= 0.05 * TOKENS * len(PROMPTS)
    if name:
        model.unload()
        assert sum(a.text != b.text for a, b in zip(served.base, served.adapter, strict=True)) >= 8

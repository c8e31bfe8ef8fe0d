"""A folder with a random model that `loramux serve` takes like any other: dense safetensors and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from loadtest.gpu.shape import Decoder

END = 256
"""A token a byte; then the end; then fillers, so that the vocabulary has the size of a real one."""


def write_model(decoder: Decoder, folder: Path, device: str) -> Path:
    """Write it, bf16, the same whenever `device` is the same."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**decoder.config())
    # Of unit size through every layer, so that attention has a say in the answers.
    config.initializer_range = decoder.hidden**-0.5
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {f"<{i}>": i for i in range(END, decoder.vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"<{END}>").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder

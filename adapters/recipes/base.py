"""The frozen base of all adapters: SmolLM2-135M-Instruct with its NF4 weights dequantized.

The weights are those that the server computes with. Knows nothing of tasks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from loramux.model.loading import dequantized_model
from loramux.model.sources import open_source
from transformers import PreTrainedModel

SOURCE = "smollm2"
TITLE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Codec:
    """Text to token ids and back, with the base's chat template."""

    tokenizer: Any

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def prompt(self, text: str) -> list[int]:
        """Ids of one user message, up to where the answer begins."""
        turn = [{"role": "user", "content": text}]
        ids: list[int] = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        return ids

    def answer(self, text: str) -> list[int]:
        """Ids of an answer and its end."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]

    def text(self, ids: list[int]) -> str:
        """The text of generated ids up to the end of the answer."""
        kept = ids[: ids.index(self.end)] if self.end in ids else ids
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


def load_base(dtype: torch.dtype, attention: str = "sdpa") -> tuple[PreTrainedModel, Codec]:
    """The frozen dense model that holds the dequantized NF4 weights, and its codec."""
    source = open_source(SOURCE)
    return dequantized_model(source, dtype, attention), Codec(source.tokenizer)


def use_threads(threads: int | None) -> None:
    """Compute on this many threads; None leaves one core to the machine if it is busy with something else.

    A thread that waits at a barrier for one that has lost its core makes everything ten times slower, so on a busy
    machine fewer threads are faster.
    """
    if threads is None:
        cores = os.cpu_count() or 1
        threads = max(1, cores - round(os.getloadavg()[0]))
    torch.set_num_threads(threads)

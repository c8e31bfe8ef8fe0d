"""The peer that everybody has: transformers + PEFT, one `generate` call on a mixed batch (`adapter_names`).

It gets the same base, the same adapters, the same prompts and lengths, greedy, end-of-sequence ignored, as
one static batch that is full from the first step to the last: the best case for it. Two kinds of base
weights: `nf4` (bitsandbytes Linear4bit, what its users run) and `dense` (the NF4 weights dequantized once to
bf16: 3.9 times the memory, less work a step). torch, transformers and PEFT are imported when a peer is
built, not before.

A timing peer only: bitsandbytes' Linear4bit repacks its weight in place at the first forward on some CPUs,
so nothing read from this model afterwards can be trusted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

Weights = Literal["nf4", "dense"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)


class Generated(NamedTuple):
    """What a batch took, and the ids that it gave, one list a prompt."""

    seconds: float
    token_ids: list[list[int]]


class PeftPeer:
    """A PEFT model with all adapters loaded, ready to be timed."""

    def __init__(self, base: Any, adapters: Sequence[Path], weights: Weights) -> None:
        """Take a dense transformers model, which is used up, and PEFT adapter folders (none: the base alone)."""
        from peft import PeftModel

        self.weights = weights
        self.vocab_size = int(base.config.vocab_size)
        model = to_nf4(base) if weights == "nf4" else base
        self.names = [folder.name for folder in adapters]
        if adapters:
            # PEFT would hold bf16 adapters in fp32; as they are, they run 5 to 15 % faster here.
            as_is: dict[str, Any] = {"autocast_adapter_dtype": False}
            model = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=self.names[0], **as_is)
            for folder in adapters[1:]:
                model.load_adapter(str(folder), adapter_name=folder.name, **as_is)
        self.model = model.eval()

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Generated:
        """Generate exactly `output_len` tokens for each prompt (all of one length), prompt i with adapter i
        mod N.

        The time is from the call to the last token. Raises RuntimeError if PEFT generates another number of tokens.
        """
        import torch

        device = next(self.model.parameters()).device
        ids = torch.tensor([list(prompt) for prompt in prompts], device=device)
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": output_len,
            "min_new_tokens": output_len,
            "do_sample": False,
        }
        if self.names:
            options["adapter_names"] = [self.names[i % len(self.names)] for i in range(len(prompts))]
        begin = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(input_ids=ids, **options)
        seconds = time.perf_counter() - begin
        answers = output[:, ids.shape[1] :]
        if answers.shape[1] != output_len:
            raise RuntimeError(f"PEFT returned {answers.shape[1]} tokens, not {output_len}")
        return Generated(seconds, answers.tolist())


def build(
    model: str,
    adapters: Sequence[Path],
    weights: Weights | Literal["fastest"],
    *,
    concurrency: int,
    prompt_len: int,
    threads: int | None = None,
) -> PeftPeer:
    """Build a peer and warm it up; "fastest" times both kinds on a short batch and keeps the faster."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    best: tuple[float, PeftPeer] | None = None
    for kind in WEIGHTS if weights == "fastest" else (weights,):
        peer = PeftPeer(load_base(model), adapters, kind)
        probe = [[(i * prompt_len + j) % peer.vocab_size for j in range(prompt_len)] for i in range(concurrency)]
        peer.generate(probe, 1)
        seconds = peer.generate(probe, 6).seconds
        if best is None or seconds < best[0]:
            best = (seconds, peer)
    assert best is not None
    return best[1]


def load_base(model: str) -> Any:
    """Return the base (a name, a folder or a file, as `loramux serve --model` takes it) as a dense bf16
    transformers model that holds dequantized NF4 weights, the same that our server computes with.
    """
    import torch
    from loramux.model.loading import dequantized_model

    return dequantized_model(model, dtype=torch.bfloat16)


def to_nf4(model: Any) -> Any:
    """Replace the decoder's linears, in place, by bitsandbytes NF4 ones (double quantization, bf16 compute).

    Weights that were NF4 before they were dequantized come back to the same NF4 values but for rounding to
    bf16.
    """
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        quantized = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
        )
        quantized.weight = Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        if module.bias is not None:
            quantized.bias = module.bias
        model.set_submodule(name, quantized.to(module.weight.device))
    model.is_loaded_in_4bit = True  # what PEFT looks at to choose its own Linear4bit wrapper
    return model

"""Proves at load that a model may be driven flat; a model that fails is refused by name.

Modeling code that ignores the attention interface only warns, and code that keeps state across a batch says nothing
at all: so the model is run, and its answers are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from loramux.errors import StartupError, UnsupportedModel
from loramux.model.attention import FlatAttentionError
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.refusal import refusing
from loramux.ops.device import out_of_memory

BLOCK = 4  # tokens of a KV block until the cache proper is allocated


@contextmanager
def driven_flat(model: CausalLM) -> Iterator[None]:
    """Around whatever runs the model for the first times. Raises UnsupportedModel with the reason for what its modeling
    code raises; StartupError if memory ran out."""
    name = _name(model)
    try:
        with refusing(f"{name}: its modeling code fails when driven flat"):
            yield
    except UnsupportedModel as error:
        cause = error.__cause__
        if isinstance(cause, FlatAttentionError):
            raise UnsupportedModel(f"{name}: {cause}; it cannot be driven flat") from cause
        if isinstance(cause, MemoryError) or (cause is not None and out_of_memory(cause)):
            raise StartupError(
                f"{name}: {model.device} ran out of memory in the first short passes; take a smaller model, a larger "
                "device, or give up what else runs there"
            ) from cause
        raise


def require_paged_attention(model: CausalLM) -> None:
    """After one pass: raises UnsupportedModel unless attention was `attention.paged_attention` once in each layer."""
    calls, layers = model.attention_calls, set(range(model.facts.layers))
    if set(calls) != layers or set(calls.values()) != {1}:
        raise UnsupportedModel(
            f"{_name(model)}: attention went through transformers' AttentionInterface in {len(calls)} of "
            f"{len(layers)} layers; its modeling code does its own attention, which cannot be paged"
        )


def prove_flat(model: CausalLM) -> None:
    """Run two short sequences apart, together, and the second in two chunks; all must give the same logits.

    Leaves the layers' KV shapes known (`kv_bytes_per_token`). Raises UnsupportedModel with the reason, and what the
    modeling code raises: call it within `driven_flat`.
    """
    name = _name(model)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(model.vocab_size, (n,), generator=generator).tolist() for n in (5, 9))
    # The first pass shows each layer's shape; caches are made as they are met.
    model.attention_calls.clear()
    alone_first = model.forward(flat_inputs([(first, 0)], BLOCK))
    require_paged_attention(model)
    if not alone_first.isfinite().all():
        raise UnsupportedModel(
            f"{name}: its logits in {model.facts.dtype} are not all finite; its weights are damaged, or its "
            "activations need more range or precision: try --dtype bf16 or fp32"
        )
    model.allocate_kv(8, BLOCK)
    alone_second = model.forward(flat_inputs([(second, 0)], BLOCK))
    together = model.forward(flat_inputs([(first, 0), (second, 0)], BLOCK))
    _same(name, "two sequences in one flat pass", together, torch.cat((alone_first, alone_second)))
    model.forward(flat_inputs([(first, 0), (second[:4], 0)], BLOCK))
    rest = model.forward(flat_inputs([(first, 4), (second, 4)], BLOCK))
    expected = torch.cat((alone_first[4:], alone_second[4:]))
    _same(name, "a sequence in two chunks", rest, expected)


def _name(model: CausalLM) -> str:
    return f"{model.facts.name} ({model.facts.architecture})"


def _same(name: str, what: str, got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-4 if got.dtype == torch.float32 else 4e-2
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{name}: {what} gave other logits than separate passes (relative difference {error:.2g}); "
            "its modeling code ignores positions or mixes sequences"
        )

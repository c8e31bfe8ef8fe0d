"""`loramux plan`: what fits on a GPU, told from a model's config by what plans the server's memory, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from loramux.config import Settings
from loramux.engine.settings import EngineSettings
from loramux.errors import TooLittleMemory
from loramux.lora.layout import Factors, lay_out
from loramux.model.causal_lm import ModelFacts
from loramux.model.kv_capacity import kv_blocks, kv_memory, least_kv_blocks, most_kv_blocks, reserve, room_for_one
from loramux.model.outline import Outline, outline
from loramux.tables import size

# What is gone of a GPU's memory before the first weight: CUDA's context, torch's kernels, cuBLAS's workspace. The
# server finds it gone; here it is an estimate, on the safe side.
CUDA_CONTEXT = 640 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a GPU's memory would go to.

    cuda_context_bytes  an estimate
    nf4_bytes           linear layers, `bits_per_weight` bits a weight; 0 of a merged model
    dense_bytes         other weights: embedding, head, norms, biases
    adapter_bytes, step_bytes, graphs_bytes  see kv_capacity.Reserve
    kv_tokens           tokens that the KV cache holds: `sequences` of `max_context` tokens. 0 if the plan does not fit
    max_context_asked   --max-context; `max_context` is less if the model was not made for as many
    kv_fraction         of what is left for it, that the KV cache may take; 0 if --kv-memory is a number of bytes
    kv_bounded          whether more tokens could never be used, because of --max-batch-rows
    unused_bytes        what nothing takes, unless the KV cache is given more (--kv-memory)
    one_adapter_bytes   an adapter of `rank` on all `linear_layers`; `adapters` of them fit at once
    missing_bytes       how many more the GPU, or --kv-memory, would need, and `problem`, the sentence that says it; 0
                        and None if all fits
    """

    model: str
    architecture: str
    parameters: int
    dtype: str
    gpu_bytes: int
    cuda_context_bytes: int
    nf4_bytes: int
    bits_per_weight: float
    dense_bytes: int
    adapter_bytes: int
    step_bytes: int
    graphs_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    kv_bytes: int
    kv_bounded: bool
    max_context: int
    max_context_asked: int
    kv_fraction: float
    sequences: int
    unused_bytes: int
    rank: int
    linear_layers: int
    one_adapter_bytes: int
    adapters: int
    missing_bytes: int
    problem: str | None


def plan(source: str, settings: Settings, gpu_bytes: int, rank: int) -> Plan:
    """The plan for a GPU of `gpu_bytes` and adapters of `rank`. Raises what `outline` does."""
    model = outline(source, dtype=settings.dtype, max_context=settings.max_context)
    return plan_outline(model, settings, gpu_bytes, rank)


def plan_outline(model: Outline, settings: Settings, gpu_bytes: int, rank: int) -> Plan:
    """As `plan`, of a model that was outlined with these settings."""
    facts, kept = model.facts, reserve(model, settings)
    block_size = EngineSettings().block_size
    block_bytes = model.kv_bytes_per_token * block_size
    free = gpu_bytes - CUDA_CONTEXT - facts.nf4_bytes - facts.dense_bytes
    blocks, missing, problem = 0, 0, None
    try:
        if free < 0:
            missing = kept.total + room_for_one(model, settings, block_size) - free
            raise _weights_do_not_fit(facts, gpu_bytes, missing)
        blocks = kv_blocks(model, settings, block_size, free)
    except TooLittleMemory as error:
        missing, problem = error.missing, f"{error.message} ({size(error.missing)} are missing)"
    one_adapter = lay_out([Factors(site, rank) for site in model.sites], model.dtype.itemsize).elements
    one_adapter_bytes = one_adapter * model.dtype.itemsize
    return Plan(
        model=facts.name,
        architecture=facts.architecture,
        parameters=facts.parameters,
        dtype=facts.dtype,
        gpu_bytes=gpu_bytes,
        cuda_context_bytes=CUDA_CONTEXT,
        nf4_bytes=facts.nf4_bytes,
        bits_per_weight=facts.bits_per_weight,
        dense_bytes=facts.dense_bytes,
        adapter_bytes=kept.adapters,
        step_bytes=kept.step,
        graphs_bytes=kept.graphs,
        kv_bytes_per_token=model.kv_bytes_per_token,
        kv_tokens=blocks * block_size,
        kv_bytes=blocks * block_bytes,
        kv_bounded=blocks == most_kv_blocks(model, settings, block_size),
        max_context=model.max_context,
        max_context_asked=settings.max_context,
        kv_fraction=kv_memory(model, settings).fraction,
        sequences=blocks // least_kv_blocks(model, block_size),
        unused_bytes=0 if problem else free - kept.total - blocks * block_bytes,
        rank=rank,
        linear_layers=len(model.sites),
        one_adapter_bytes=one_adapter_bytes,
        adapters=kept.adapters // one_adapter_bytes,
        missing_bytes=missing,
        problem=problem,
    )


def _weights_do_not_fit(facts: ModelFacts, gpu_bytes: int, missing: int) -> TooLittleMemory:
    return TooLittleMemory(
        f"{facts.name}: {size(facts.nf4_bytes + facts.dense_bytes)} of weights and {size(CUDA_CONTEXT)} of CUDA's own "
        f"do not fit into {size(gpu_bytes)} with adapters, a step and the KV cache of one request",
        missing,
    )

"""What clients get, as frozen dataclasses, and what they may ask for. Re-exported by `loramux.client`.

Knows nothing of proto messages and channels; imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict

# A turn: `role` ("system", "user" or "assistant") and `content`, a text or a list of text parts as OpenAI has them.
ChatTurn = Mapping[str, Any]


class Sampling(TypedDict, total=False):
    """How tokens are chosen; absent ones take the server's defaults. See SamplingParams in generation.proto."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    n: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int


class Generation(Sampling, total=False):
    """Everything a request may hold beside its prompt.

    `messages` (each with role and content) or `token_ids` stand in place of a prompt. `parse_special` says whether the
    text of a special token in a prompt is that token (it is by default); in `messages` it never is. `adapter` names one
    adapter, `mix` several with their weights; without either, the base answers.
    """

    messages: Sequence[ChatTurn]
    parse_special: bool
    token_ids: Sequence[int]
    adapter: str
    mix: Mapping[str, float]
    request_id: str
    cache_salt: str
    priority: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural log probability; `top` holds the most likely ones at its place."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class UsedAdapter:
    """The adapter that a request resolved to and kept to its end."""

    name: str
    uid: str
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of the whole request."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds."""

    queue: float
    adapter_load: float
    prefill: float
    decode: float

    @property
    def first_token(self) -> float:
        """From arrival to the first token."""
        return self.queue + self.adapter_load + self.prefill


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated sequence. `finish_reason` is "stop" or "length"."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    stop: str


@dataclass(frozen=True, slots=True)
class Result:
    """The whole answer."""

    request_id: str
    adapters: tuple[UsedAdapter, ...]
    completions: tuple[Completion, ...]
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text


@dataclass(frozen=True, slots=True)
class Started:
    """The first event of a stream."""

    request_id: str
    prompt_tokens: int
    adapters: tuple[UsedAdapter, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of sequence `index`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of sequence `index`. `usage` and `timings` are complete in a stream's last event."""

    index: int
    finish_reason: str
    stop: str
    usage: Usage
    timings: Timings
    text: str = ""


StreamEvent = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Model:
    """The resident base and its limits; see GetModelResponse."""

    model: str
    architecture: str
    parameters: int
    bits_per_weight: float
    weight_bytes: int
    device: str
    max_context: int
    vocab_size: int
    kv_capacity_tokens: int
    max_n: int
    max_stop_strings: int
    max_top_logprobs: int
    version: str
    target_modules: tuple[str, ...]
    merged_adapter: str
    max_chat_turns: int
    max_mix: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as the server sees it.

    `state` is "registered", "loading", "ready", "draining", "failed" or "unloaded"; `residency` "disk", "host" or
    "device". `warnings` are sentences about what is served and hardly meant.
    """

    name: str
    uid: str
    digest: str
    source: str
    state: str
    residency: str
    pinned: bool
    device_bytes: int
    size_bytes: int
    max_rank: int
    target_modules: tuple[str, ...]
    sites: int
    leases: int
    loaded_at: datetime | None
    last_used_at: datetime | None
    load_seconds: float
    error: str
    merged: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterList:
    """All adapters, and the bytes they take on the device and, put out of it, in the host's memory."""

    adapters: tuple[Adapter, ...]
    device_bytes: int
    device_budget_bytes: int
    host_bytes: int
    host_budget_bytes: int


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What unloading gave."""

    freed_bytes: int
    cancelled_requests: int


@dataclass(frozen=True, slots=True)
class Merging:
    """Progress of a merge: tensors written, and in all."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge that is done: the server's new folder, and how exact it is; see MergeReport in adapters.proto."""

    output: str
    bytes: int
    layers: int
    overall_error: float
    worst_error: float
    worst_layer: str

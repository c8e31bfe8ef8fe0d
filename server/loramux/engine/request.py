"""The records that pass between the faces (rpc, http), the engine and its scheduler. Imports no torch."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from loramux.errors import LoramuxError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; already checked against the server's limits by the engine's door."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0


class AdapterHandle(Protocol):
    """What a request holds of an adapter: its lease.

    `weights` is None until the adapter is where the model computes and stays there for this request; then it maps site
    index → LoraWeights and never changes again. `error` is set instead if that cannot be. `mixable` says whether it
    may be weighted and added to others; it is known with the weights, and true before. All are written once, by one
    thread, and only read here.
    """

    @property
    def name(self) -> str: ...
    @property
    def uid(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def mixable(self) -> bool: ...
    @property
    def weights(self) -> Mapping[int, Any] | None: ...
    @property
    def error(self) -> LoramuxError | None: ...


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter of a request, with its weight in the sum."""

    handle: AdapterHandle
    weight: float = 1.0


@dataclass(slots=True)
class Timings:
    """Seconds; see Timings in generation.proto."""

    queue: float = 0.0
    adapter_load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(slots=True, eq=False)
class Progress:
    """How far a request has come: written by the engine's thread alone, read by any, whatever ends the request.

    Moments are in the engine's clock (time.monotonic() seconds), None for what has not come yet.
    """

    cached_tokens: int = 0
    load_seconds: float = 0.0
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def timings(self, arrival: float, now: float) -> Timings:
        """Where the time went from `arrival` to the last token; to `now` where the first has not come."""
        started = now if self.first_scheduled is None else self.first_scheduled
        first = now if self.first_token is None else self.first_token
        last = first if self.last_token is None else self.last_token
        # The engine's thread may note one moment while another is read here.
        return Timings(
            queue=max(0.0, started - arrival - self.load_seconds),
            adapter_load=self.load_seconds,
            prefill=max(0.0, first - started),
            decode=max(0.0, last - first),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One admitted request. `deadline` and `arrival` are time.monotonic() seconds.

    `request_id` is the server's own and unique; `caller_id` is what the caller calls it, any text, for logs.
    `progress` is the engine's to write. A request is given to an engine once.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    caller_id: str = ""
    progress: Progress = field(default_factory=Progress)

    @property
    def shown_id(self) -> str:
        """The id by which whoever reads the log looks for this request."""
        return self.caller_id or self.request_id


class FinishReason(enum.Enum):
    """Why a sequence ended well. Every other end is an error."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability: natural, of the unmodified distribution. `top`: likeliest first."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Usage:
    """Token counts of a whole request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0


@dataclass(slots=True)
class Delta:
    """New output of one sequence since the last delta. Deltas of one sequence may be merged (see `merge`)."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def merge(self, later: Delta) -> None:
        """Append a later delta of the same sequence to this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs


@dataclass(slots=True)
class SequenceFinished:
    """The end of one sequence. `usage` and `timings` are complete in the last one (`last` is True)."""

    index: int
    reason: FinishReason
    stop: str = ""
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    last: bool = False


@dataclass(slots=True)
class RequestFailed:
    """The request ended with an error; nothing follows."""

    error: LoramuxError


Event = Delta | SequenceFinished | RequestFailed

"""What the gRPC face needs from the rooms below, as it needs it. No torch, no sockets.

The engine's side is `engine.client.EngineClient`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loramux.engine.request import AdapterHandle
from loramux.lora.ingredient import Ingredient


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What GetModel tells of the base; the fields are those of GetModelResponse. Limits come from the engine."""

    model: str
    architecture: str
    parameters: int
    bits_per_weight: float
    weight_bytes: int
    device: str
    kv_capacity_tokens: int
    target_modules: tuple[str, ...]
    merged_adapter: str = ""


@dataclass(frozen=True, slots=True)
class MergeStep:
    """Progress: `done` of `total` tensors are written."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class MergeDone:
    """The end of a merge; the fields are those of MergeReport in adapters.proto."""

    output: str
    bytes: int
    layers: int
    overall_error: float
    worst_error: float
    worst_layer: str


class Merger(Protocol):
    """Writes base + adapters as a dense model. Event loop's thread only; the work is done elsewhere."""

    def merge(
        self, ingredients: Sequence[Ingredient], output: str, dtype: str
    ) -> AsyncGenerator[MergeStep | MergeDone, None]:
        """Steps, then MergeDone; closing the generator stops the work. Raises InvalidRequest, PathNotAllowed, …"""
        ...

    async def close(self) -> None:
        """Stop the work, if there is any, and take no more: both with Draining."""
        ...


class Leases(Protocol):
    """The adapter registry, as far as requests use it. Event loop's thread only."""

    def lease(self, names: Sequence[str], request_id: str) -> Sequence[AdapterHandle]:
        """Resolve names and hold their adapters for this request. Raises AdapterNotFound, AdapterUnavailable, …"""
        ...

    def release(self, uid: str, request_id: str) -> None:
        """Let go; doing so twice is harmless."""
        ...


class Tokenizer(Protocol):
    """The base model's tokenizer. Called from worker threads, several at a time.

    Of a long text `at_least` is told again and again how many tokens it has at least; what it raises ends the work.
    """

    @property
    def longest_token(self) -> int:
        """Most characters of a text that one token stands for."""
        ...

    def encode(self, text: str, parse_special: bool, at_least: Callable[[int], None]) -> list[int]:
        """Ids of a text; with `parse_special`, a special token's text in it is that token."""
        ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], at_least: Callable[[int], None], template: str | None = None
    ) -> list[int]:
        """Ids of a conversation in `template`, or in the base's. Raises InvalidRequest without one."""
        ...

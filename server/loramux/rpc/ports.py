"""What the gRPC face needs from the rooms below, as it needs it. No torch, no sockets.

The engine's side is `engine.client.EngineClient`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loramux.engine.request import AdapterHandle


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


class Leases(Protocol):
    """The adapter registry, as far as requests use it. Event loop's thread only."""

    def lease(self, names: Sequence[str], request_id: str) -> Sequence[AdapterHandle]:
        """Resolve names and hold their adapters for this request. Raises AdapterNotFound, AdapterUnavailable, …"""
        ...

    def release(self, uid: str, request_id: str) -> None:
        """Let go; doing so twice is harmless."""
        ...


class Tokenizer(Protocol):
    """The base model's tokenizer. Called from worker threads, several at a time."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation in the base's chat template. Raises InvalidRequest without one."""
        ...

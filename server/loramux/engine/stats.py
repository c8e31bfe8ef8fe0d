"""What the engine tells about itself: one immutable snapshot, made after each step. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class StepSeconds:
    """Seconds spent in each part of all steps so far."""

    schedule: float = 0.0
    build: float = 0.0
    forward: float = 0.0
    sample: float = 0.0
    deliver: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges are of this moment, everything that counts up is since the start.

    A request is running if at least one of its sequences holds a place in the batch, otherwise it is waiting.
    The adapter maps count requests by adapter name; the base has the empty name. `late_compilations` are kernels and
    graphs that were made ready after the engine was.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    running_adapters: Mapping[str, int] = field(default_factory=dict)
    waiting_adapters: Mapping[str, int] = field(default_factory=dict)
    healthy: bool = True
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    faults: int = 0
    steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    finished_requests: int = 0
    late_compilations: int = 0
    step_seconds: StepSeconds = field(default_factory=StepSeconds)

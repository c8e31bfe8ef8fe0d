"""How the engine is set up: sizes of batches and queues, and limits of requests. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Frozen at start. Counts are of what their names say; durations are seconds.

    block_size is what the model allocates its KV cache with; the engine reads the model's own value.
    max_batch_rows sequences run at once and max_batch_tokens tokens go through the model in one step; the
    second is not below the first, so that every running sequence gets its token in every step.
    While sequences decode, prefill takes no more of a step than makes it step_target seconds long, about; 0: no bound.
    max_queue requests may wait to start. A reader that is max_pending_tokens behind loses its request.
    One point of priority is worth priority_seconds of waiting: that keeps low priorities from starving.
    load_poll_seconds bounds how late the engine notices an adapter load that nobody announced with `wake`.
    """

    block_size: int = 16
    max_batch_rows: int = 64
    max_batch_tokens: int = 512
    step_target: float = 0.1
    max_queue: int = 1024
    max_pending_tokens: int = 4096
    prefix_caching: bool = True
    priority_seconds: float = 1.0
    load_poll_seconds: float = 0.05
    max_consecutive_faults: int = 3

    max_n: int = 16
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 64
    max_logit_bias: int = 1024
    max_top_logprobs: int = 20
    max_request_id_chars: int = 128
    max_cache_salt_chars: int = 256
    max_priority: int = 100
    max_mix: int = 8
    max_chat_turns: int = 1024

    def __post_init__(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        if min(self.block_size, self.max_batch_rows, self.max_queue, self.max_pending_tokens) < 1:
            raise ValueError("block_size, max_batch_rows, max_queue and max_pending_tokens must be at least 1")
        if self.max_batch_tokens < self.max_batch_rows:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must not be below max_batch_rows "
                f"({self.max_batch_rows}): every running sequence takes one token of each step"
            )

"""What is sent and when: a list of planned requests, made before the clock starts, the same for the same
seed.

Knows nothing of servers, time or asyncio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Spread = Literal["even", "uniform", "zipf"]
SPREADS: tuple[Spread, ...] = get_args(Spread)
WARMUP_OUTPUT_LEN = 8


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request. `arrival` is in seconds from the start; 0 in a closed loop. `adapter` "" is the base."""

    index: int
    arrival: float
    adapter: str
    prompt_ids: tuple[int, ...]
    output_len: int


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What to plan.

    `request_rate` is in requests per second; None plans a closed loop, where the driver's concurrency sets
    the pace. `burstiness` is the shape of the gamma distribution that intervals are drawn from, as in `vllm
    bench serve`: 1 is Poisson, less is burstier, more is steadier. The mean interval is 1 / request_rate
    whatever the shape.
    """

    num_prompts: int
    prompt_len: int
    output_len: int
    vocab_size: int
    adapters: tuple[str, ...] = ()
    spread: Spread = "even"
    request_rate: float | None = None
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_len", "output_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.request_rate is not None and not 0 < self.request_rate < float("inf"):
            raise ValueError(f"request_rate must be positive and finite, not {self.request_rate}")
        if not self.burstiness > 0:
            raise ValueError(f"burstiness must be positive, not {self.burstiness}")


def plan(spec: WorkloadSpec) -> list[PlannedRequest]:
    """Return the requests in order of arrival.

    Prompts, arrivals and adapters come from three separate streams: changing the spread or the rate leaves
    the prompts as they were, so two runs that differ in one setting differ in nothing else.
    """
    prompts, times, choice = (np.random.default_rng(s) for s in np.random.SeedSequence(spec.seed).spawn(3))
    ids = prompts.integers(0, spec.vocab_size, (spec.num_prompts, spec.prompt_len)).tolist()
    arrivals = plan_arrivals(spec.num_prompts, spec.request_rate, spec.burstiness, times)
    adapters = spread_adapters(spec.num_prompts, spec.adapters, spec.spread, choice)
    return [
        PlannedRequest(i, arrivals[i], adapters[i], tuple(ids[i]), spec.output_len) for i in range(spec.num_prompts)
    ]


def warmup(spec: WorkloadSpec, requests: int) -> WorkloadSpec:
    """Return what to send before a run: `requests` or more, brief, every adapter once.

    Their prompts are their own, lest the measured ones be in a prefix cache.
    """
    return replace(
        spec,
        num_prompts=max(requests, len(spec.adapters)),
        output_len=min(spec.output_len, WARMUP_OUTPUT_LEN),
        spread="even",
        request_rate=None,
        seed=spec.seed + 1_000_003,
    )


def plan_arrivals(count: int, rate: float | None, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Return rising arrival times in seconds, the first at 0; all 0 without a rate."""
    if rate is None:
        return [0.0] * count
    intervals: npt.NDArray[np.float64] = rng.gamma(burstiness, 1.0 / (rate * burstiness), count - 1)
    return [0.0, *np.cumsum(intervals).tolist()]


def spread_adapters(count: int, names: Sequence[str], spread: Spread, rng: np.random.Generator) -> list[str]:
    """Return an adapter for each request; "" (the base) for all when there are no names.

    "even" goes round and round, so any len(names) requests in a row name every adapter: the hardest batch
    for a server. "uniform" draws any name as often as any other: the hardest traffic for a cache. "zipf" draws the
    k-th name with probability ∝ 1/k: a few adapters take most of the traffic.
    """
    if not names:
        return [""] * count
    if spread == "even":
        return [names[i % len(names)] for i in range(count)]
    odds = np.ones(len(names)) if spread == "uniform" else 1.0 / np.arange(1, len(names) + 1)
    return [names[i] for i in rng.choice(len(names), count, p=odds / odds.sum())]

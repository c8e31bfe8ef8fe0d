"""One admitted request while the engine has it: its n sequences and what they share. Imports no torch."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from loramux.engine.detokenizer import Detokenizer
from loramux.engine.door import check_mix
from loramux.engine.kv_cache import cache_root
from loramux.engine.request import (
    AdapterUse,
    Event,
    Progress,
    Request,
    Timings,
    Usage,
)
from loramux.engine.sequence import Sequence
from loramux.engine.stop_strings import StopScanner
from loramux.errors import DeadlineExceeded, InvalidRequest, LoramuxError

Sink = Callable[[Event], None]


@dataclass(frozen=True, slots=True, eq=False)
class LogitTables:
    """What the rules of every step need of a request, as arrays: int64 ids `biased` with their float32 `biases`, and
    int64 ids `ending`."""

    biased: np.ndarray
    biases: np.ndarray
    ending: np.ndarray

    @classmethod
    def of(cls, bias: Mapping[int, float], ending_ids: frozenset[int]) -> LogitTables:
        return cls(
            np.fromiter(bias, np.int64, len(bias)),
            np.fromiter(bias.values(), np.float32, len(bias)),
            np.array(sorted(ending_ids), np.int64),
        )


@dataclass(slots=True, eq=False)
class Group:
    """Times are in the engine's clock (seconds).

    `uses` are the request's adapters in canonical order (by uid, then weight): requests for the same mix
    share the prefix cache and add up their branches in the same order, so that they get the same bits.
    `loading` is set while some adapter was not where the model computes when `observe` last looked.
    """

    request: Request
    sink: Sink
    seed: int
    rank: tuple[float, int]
    uses: tuple[AdapterUse, ...]
    uses_key: tuple[tuple[str, float], ...]
    root: bytes
    ending_ids: frozenset[int]
    tables: LogitTables
    arrival: float
    sequences: list[Sequence] = field(default_factory=list)
    unfinished: int = 0
    prompt_computed: bool = False
    loading: bool = False
    loading_since: float | None = None

    @property
    def progress(self) -> Progress:
        """The request's own, which outlives the group."""
        return self.request.progress

    def observe(self, now: float) -> LoramuxError | None:
        """Note how long the adapters take to load; return the error that ends the request now, if any."""
        if self.request.deadline is not None and now >= self.request.deadline:
            where = "running" if self.progress.first_scheduled is not None else "queued"
            return DeadlineExceeded(f"the deadline passed while the request was {where}")
        if self.progress.first_scheduled is None:
            for use in self.uses:
                if use.handle.error is not None:
                    return use.handle.error
            self.loading = is_loading(self.uses)
            self._time_the_load(now)
            if not self.loading:
                return self._mix_error()
        return None

    def may_start(self, seq: Sequence) -> bool:
        """All but the first sequence wait until the prompt is computed, then find it in the prefix cache."""
        return not self.loading and (seq.index == 0 or self.prompt_computed)

    def usage(self) -> Usage:
        """Tokens so far, over all sequences."""
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=sum(seq.num_output for seq in self.sequences),
            cached_prompt_tokens=self.progress.cached_tokens,
        )

    def timings(self, now: float) -> Timings:
        """Where the time went until `now`."""
        return self.progress.timings(self.arrival, now)

    def _mix_error(self) -> InvalidRequest | None:
        """The door's error for adapters that were loading when the request came."""
        try:
            check_mix(self.request.adapters)
        except InvalidRequest as error:
            return error
        return None

    def _time_the_load(self, now: float) -> None:
        if self.loading:
            if self.loading_since is None:
                self.loading_since = min(now, self.arrival)
            self.progress.load_seconds = now - self.loading_since
        elif self.loading_since is not None:
            self.progress.load_seconds = now - self.loading_since
            self.loading_since = None


def is_loading(uses: Iterable[AdapterUse]) -> bool:
    """Whether some adapter is not where the model computes yet."""
    return any(use.handle.weights is None for use in uses)


def make_group(
    request: Request,
    sink: Sink,
    *,
    seed: int,
    rank: tuple[float, int],
    arrival: float,
    max_context: int,
    eos_token_ids: frozenset[int],
    detokenizer: Detokenizer,
) -> Group:
    """A group with its n sequences, not scheduled yet."""
    p = request.sampling
    uses = tuple(sorted(request.adapters, key=lambda use: (use.handle.uid, use.weight)))
    uses_key = tuple((use.handle.uid, use.weight) for use in uses)
    ending_ids = p.stop_token_ids if p.ignore_eos else p.stop_token_ids | eos_token_ids
    group = Group(
        request=request,
        sink=sink,
        seed=seed,
        rank=rank,
        uses=uses,
        uses_key=uses_key,
        root=cache_root(uses_key, request.cache_salt),
        ending_ids=ending_ids,
        tables=LogitTables.of(p.logit_bias, ending_ids),
        arrival=arrival,
        unfinished=p.n,
        loading=is_loading(uses),
    )
    scanner = StopScanner(p.stop, detokenizer.split)
    prompt = array("q", request.prompt_ids)
    group.sequences = [
        Sequence(
            group=group,
            index=i,
            tokens=prompt[:],
            end=min(len(request.prompt_ids) + p.max_new_tokens, max_context),
            text=detokenizer.open(),
            scanner=scanner.fork(),
        )
        for i in range(p.n)
    ]
    return group

"""One load of one adapter, as requests hold it and operators see it. Imports no torch."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from loramux.errors import LoramuxError


class State(enum.Enum):
    """Where an adapter is in its life; see AdapterState in adapters.proto."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    UNLOADED = "unloaded"


class Residency(enum.Enum):
    """Where an adapter's weights are."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class LoadedAdapter(Protocol):
    """What a load gives (lora.adapter.Adapter is one). `weights` maps site index → LoraWeights."""

    @property
    def weights(self) -> Mapping[int, Any]: ...
    @property
    def mixable(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def max_rank(self) -> int: ...
    @property
    def target_modules(self) -> Sequence[str]: ...
    @property
    def site_count(self) -> int: ...


@dataclass(slots=True, eq=False)
class AdapterEntry:
    """One load of one adapter. Only the registry writes to it; it is also the handle that requests hold.

    `weights` is set when it becomes READY and taken away when its last request is gone. `error` is set if the load
    fails: an AdapterUnavailable with the reason in full, for the requests that waited. `leases` are the ids of the
    requests that use it: a set, so that taking and giving back twice is harmless. `loaded_at` and `last_used_at` are
    seconds since the epoch; 0 is never.
    """

    name: str
    uid: str
    source: str
    pinned: bool
    digest: str = ""
    state: State = State.LOADING
    residency: Residency = Residency.DISK
    leases: set[str] = field(default_factory=set)
    nbytes: int = 0
    max_rank: int = 0
    target_modules: tuple[str, ...] = ()
    site_count: int = 0
    loaded_at: float = 0.0
    last_used_at: float = 0.0
    load_seconds: float = 0.0
    error: LoramuxError | None = None
    mixable: bool = True  # known once it is READY
    weights: Mapping[int, Any] | None = None

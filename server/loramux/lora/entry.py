"""One load of one adapter, as requests hold it and operators see it. Imports no torch."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from loramux.errors import LoramuxError


class State(enum.Enum):
    """Where an adapter is in its life; see AdapterState in adapters.proto."""

    REGISTERED = "registered"
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
    @property
    def chat_template(self) -> str | None:
        """Its own, if messages for it are to be rendered with that."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """Sentences about what can be served and is hardly meant."""
        ...

    @property
    def on_host(self) -> LoadedAdapter | None:
        """The same in the host's memory, to be kept when it is put out of the device; None if only files are left."""
        ...


@dataclass(slots=True, eq=False)
class Lease:
    """One request's hold on one load of an adapter: the handle that the engine sees. Only `Tiers` writes to it.

    `weights` is None until it is this request's turn; then the adapter is on the device until the lease is released.
    `error` is set instead if that cannot be, or later if an operator takes the adapter back: then it ends a request
    that has not started to compute. Each is written once.
    """

    entry: AdapterEntry
    request_id: str
    weights: Mapping[int, Any] | None = None
    error: LoramuxError | None = None

    @property
    def name(self) -> str:
        """The name it was asked for by."""
        return self.entry.name

    @property
    def uid(self) -> str:
        """The load's unique id."""
        return self.entry.uid

    @property
    def digest(self) -> str:
        """Of its files; empty until they have been read for the first time."""
        return self.entry.digest

    @property
    def mixable(self) -> bool:
        """Whether it may be weighted and added to others."""
        return self.entry.mixable


@dataclass(slots=True, eq=False)
class AdapterEntry:
    """One version of one adapter. Only the registry and its tiers write to it.

    It is REGISTERED until its files have been read for the first time, and READY from then on, wherever its weights
    are. `error` is set if a load fails: an AdapterUnavailable with the reason in full, for the requests that waited.
    `leases` are by request, so that taking and giving back twice is harmless. `loaded_at` and `last_used_at` are
    seconds since the epoch; 0 is never.

    size            bytes it takes on the device; None until its header has been read
    nbytes          bytes it takes there now, or took when it was unloaded
    weights, loaded while it is on the device
    hosted          while it is in the host's memory only
    uses, worth     what the tiers count to choose whom to put out
    managed         found under a root, where it is looked after; others come and go by an operator's word
    fixed           nothing but its digest will do: an adapters file says so
    irreplaceable   what is in memory cannot be read again: its files have changed
    read_as         what its files looked like (lora.scan) when they were read, or were to be
    template_as     what its own chat template was (lora.chat_template) when they were read
    warnings        what an operator should know of it, in sentences; `notice`, what is said of its folder, is one
    """

    name: str
    uid: str
    source: str
    pinned: bool
    digest: str = ""
    state: State = State.LOADING
    residency: Residency = Residency.DISK
    leases: dict[str, Lease] = field(default_factory=dict, repr=False)
    size: int | None = None
    nbytes: int = 0
    max_rank: int = 0
    target_modules: tuple[str, ...] = ()
    site_count: int = 0
    loaded_at: float = 0.0
    last_used_at: float = 0.0
    load_seconds: float = 0.0
    chat_template: str | None = None  # known once it is READY
    error: LoramuxError | None = None
    mixable: bool = True  # known once it is READY
    weights: Mapping[int, Any] | None = None
    loaded: LoadedAdapter | None = None
    hosted: LoadedAdapter | None = None
    uses: int = 0
    worth: float = 0.0
    managed: bool = False
    fixed: bool = False
    irreplaceable: bool = False
    read_as: tuple[object, ...] = ()
    template_as: str = ""
    notice: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def loading(self) -> bool:
        """A load of it runs that an operator asked for."""
        return self.state is State.LOADING

    @property
    def held(self) -> bool:
        """A request computes with it, or may at any moment."""
        return any(lease.weights is not None for lease in self.leases.values())

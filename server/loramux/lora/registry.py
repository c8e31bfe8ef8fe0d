"""Which adapters there are, who uses them and what they take: the rules, without files, tensors or waiting.

Owned by the event loop's thread. Every method is plain and synchronous: no lock, no I/O, no await, so each is one
step for everybody else. The engine's thread only reads `weights` and `error` of leases that its requests hold.

Life of an entry: LOADING (by an operator's word) or REGISTERED (found under a root) → READY → DRAINING → UNLOADED, or
→ FAILED → UNLOADED. Where the weights of a READY one are is the tiers' business.
"""

from __future__ import annotations

import logging
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from loramux.errors import AdapterNotFound, AdapterUnavailable, InvalidAdapter, LoramuxError, PathNotAllowed
from loramux.lora.entry import AdapterEntry, Lease, LoadedAdapter, State
from loramux.lora.near_names import NearNames
from loramux.lora.roots import NAME_RULE, is_name
from loramux.lora.subscription import Subscription
from loramux.lora.tiers import Tiers

log = logging.getLogger(__name__)

Listener = Callable[[AdapterEntry], None]

_MOST_UNLOADED = 1024  # names of unloaded adapters that are remembered

LOAD_FAILED = "ADAPTER_LOAD_FAILED"  # the reason of a load that ended with a defect


class AdapterRegistry:
    """Names, uids and leases; its `tiers` have the bytes.

    `device_budget` is the most bytes of adapters on the device, loaded or reserved for a load; None is no bound.
    `host_budget` is the same for those that are kept in the host's memory only.
    """

    def __init__(
        self,
        *,
        device_budget: int | None = None,
        host_budget: int | None = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.tiers = Tiers(device_budget, host_budget)
        self.tiers.changed = self._changed
        self.loaded: Callable[[AdapterEntry], None] = lambda entry: None  # its files were read
        self.budget = self.tiers.device
        self._clock = clock
        self._names: dict[str, AdapterEntry] = {}  # what a client's name means now
        self._replacing: dict[str, AdapterEntry] = {}  # LOADING, to take over a READY name
        self._entries: dict[str, AdapterEntry] = {}  # by uid: all that are not UNLOADED
        self._listeners: list[Listener] = []
        self._ordered: list[tuple[str, str]] | None = []  # name and uid of all, sorted; None: to be sorted again
        self._near = NearNames()
        self._unloaded: dict[str, str] = {}  # what operators took away, and its source; the last ones only
        self.private: tuple[str, ...] = ()  # folders whose paths no request's error may tell
        self.unfit: Mapping[str, str] = {}  # folders that cannot be served, by name, and why (lora.scan)

    # What there is.

    def find(self, name: str) -> AdapterEntry | None:
        """What `name` means now: anything but DRAINING or UNLOADED."""
        return self._names.get(name)

    def get(self, name: str) -> AdapterEntry:
        """Like find, but raises AdapterNotFound."""
        entry = self._names.get(name)
        if entry is None:
            raise AdapterNotFound(name, hint=self._hint(name))
        return entry

    def _hint(self, name: str) -> str:
        """What may be meant by a name that nothing has; at a bounded cost, for anybody can ask."""
        if name in self.unfit:
            return f"there is a folder of that name, but it {self.unfit[name]}"
        if name in self._unloaded:
            under_a_root = self._unloaded[name] in (f"{root}/{name}" for root in self.private)
            back = f"; `loramux adapters load {name}` brings it back" if under_a_root else ""
            return f"an operator unloaded it{back}"
        if not is_name(name):
            return f"that is no adapter's name: {NAME_RULE}"
        near = self._near.of(name)
        return f"did you mean {' or '.join(map(repr, near))}?" if near else ""

    def by_uid(self, uid: str) -> AdapterEntry | None:
        """The version, as long as there is anything of it."""
        return self._entries.get(uid)

    def loading(self, name: str) -> AdapterEntry | None:
        """The load that runs for `name`: a first one or a replacement."""
        entry = self._replacing.get(name) or self._names.get(name)
        return entry if entry is not None and entry.state is State.LOADING else None

    def draining(self, name: str) -> list[AdapterEntry]:
        """The entries that had this name and still serve requests."""
        return [e for e in self._entries.values() if e.name == name and e.state is State.DRAINING]

    def entries(self) -> list[AdapterEntry]:
        """All of them, by name; of one name the older first."""
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def page(self, after: tuple[str, str], most: int) -> list[AdapterEntry]:
        """`most` of them by name and uid, beginning after that place."""
        if self._ordered is None:
            self._ordered = sorted((entry.name, uid) for uid, entry in self._entries.items())
        start = bisect_right(self._ordered, after)
        return [self._entries[uid] for _, uid in self._ordered[start : start + most]]

    # Requests.

    def lease(self, names: Sequence[str], request_id: str) -> list[Lease]:
        """Hold what `names` mean now until `release(lease.uid, request_id)`, whatever happens to the names.

        All of them get their `weights` in one moment, when it is this request's turn (lora.tiers); or one gets an
        `error`. Raises AdapterNotFound, or AdapterUnavailable with the reason if a load failed, and then holds nothing.
        """
        entries = [self.get(name) for name in names]
        for entry in entries:
            if entry.state is State.FAILED:
                assert entry.error is not None
                raise self._for_clients(entry.name, entry.error)
        leases = []
        for entry in entries:
            entry.last_used_at = self._clock()
            leases.append(entry.leases.setdefault(request_id, Lease(entry, request_id)))
        self.tiers.enter(request_id, leases)
        return leases

    def release(self, uid: str, request_id: str) -> None:
        """Give a lease back. Harmless if there is none, so every way out of a request may call it."""
        entry = self._entries.get(uid)
        if entry is None:
            return
        entry.leases.pop(request_id, None)
        if entry.state is State.DRAINING and not entry.leases:
            self._drop(entry)
        self.tiers.leave(request_id)

    # Loads.

    def register(
        self, name: str, source: str, *, pinned: bool = False, digest: str = "", managed: bool = True
    ) -> AdapterEntry:
        """A REGISTERED entry, read when first asked for; what had the name drains. `digest`: what its files must be.

        No load of the name may run.
        """
        assert self.loading(name) is None, f"{name} is being loaded"
        current = self._names.get(name)
        entry = AdapterEntry(name, uuid.uuid4().hex, source, pinned, digest, State.REGISTERED)
        entry.managed, entry.fixed = managed, bool(digest)
        self._keep(entry)
        self._give_name(entry)
        self._changed(entry)
        if current is not None:
            self._retire(current)
        return entry

    def begin(
        self, name: str, source: str, *, pinned: bool = False, managed: bool = False, fixed: bool = False
    ) -> AdapterEntry:
        """A LOADING entry. A READY or REGISTERED one of the name serves until `ready`; a FAILED one is forgotten."""
        assert self.loading(name) is None, f"{name} is being loaded already"
        entry = AdapterEntry(name, uuid.uuid4().hex, source, pinned, managed=managed, fixed=fixed)
        current = self._names.get(name)
        if current is not None and current.state is State.FAILED:
            self._drop(current)
            current = None
        self._keep(entry)
        if current is None:
            self._give_name(entry)
        else:
            self._replacing[name] = entry
        self._changed(entry)
        return entry

    def ready(self, uid: str, loaded: LoadedAdapter, *, load_seconds: float = 0.0) -> AdapterEntry:
        """LOADING → READY; the name now means this entry, and what it replaces drains.

        The reservation becomes the adapter's exact bytes. Raises Overloaded if those do not fit; the entry is LOADING
        still, and the caller fails it.
        """
        entry = self._entries[uid]
        assert entry.state is State.LOADING, entry
        self._take(entry, loaded, load_seconds)
        old = None
        if self._replacing.get(entry.name) is entry:
            del self._replacing[entry.name]
            old = self._names.get(entry.name)
        self._give_name(entry)
        self._changed(entry)
        if old is not None:
            self._retire(old)
        self.tiers.advance()
        return entry

    def fetched(self, uid: str, loaded: LoadedAdapter, *, load_seconds: float | None = None) -> None:
        """What the tiers asked for is on the device; `load_seconds` is None if no file was read for it.

        Raises InvalidAdapter if the files are not those that the entry stands for, Overloaded if they take more than
        was reserved; the caller then says `fetch_failed`.
        """
        entry = self._entries[uid]
        if entry.digest and loaded.digest != entry.digest:
            raise InvalidAdapter(
                entry.source,
                f"holds {loaded.digest}, not {entry.digest}, which this adapter stands for and which is not in memory "
                "any more; load what lies there now, or put back what lay there",
                reason="ADAPTER_FILES_CHANGED",
            )
        self._take(entry, loaded, load_seconds)
        self._changed(entry)
        self.tiers.advance()

    def _take(self, entry: AdapterEntry, loaded: LoadedAdapter, load_seconds: float | None) -> None:
        if load_seconds is not None:
            entry.load_seconds = load_seconds
        self.tiers.arrived(entry, loaded)
        entry.digest = loaded.digest
        entry.max_rank = loaded.max_rank
        entry.target_modules = tuple(loaded.target_modules)
        entry.site_count = loaded.site_count
        entry.mixable = loaded.mixable
        entry.chat_template = loaded.chat_template
        warnings = (*loaded.warnings, *((entry.notice,) if entry.notice else ()))
        if warnings != entry.warnings:  # else it was read again, and they were told
            entry.warnings = warnings
            for warning in loaded.warnings:
                log.warning("adapter %r is served, but %s", entry.name, warning)
        entry.loaded_at = self._clock()
        if entry.state is not State.DRAINING:
            entry.state = State.READY
        if load_seconds is not None:
            self.loaded(entry)

    def fetch_failed(self, uid: str, error: LoramuxError) -> None:
        """What the tiers asked for cannot be had: for all that wait for it, and for all that come if its files are at
        fault. Others may ask again."""
        entry = self._entries.get(uid)
        if entry is None:
            return
        told = _unavailable(entry.name, error.message, error.reason)
        if _stays(error, entry) and not entry.held:
            entry.state, entry.error = State.FAILED, told
            self._changed(entry)
        self.tiers.failed(entry, self._for_clients(entry.name, told if isinstance(error, InvalidAdapter) else error))

    def fail(self, uid: str, error: LoramuxError) -> AdapterEntry:
        """LOADING → FAILED with the reason; requests that wait for it see `error`.

        A first load leaves a FAILED entry under the name, without memory, until the next load or unload. A failed
        replacement is gone at once, and what it was to replace serves on. What the load reserved is the loader's to
        give back: a worker may still hold that memory.
        """
        entry = self._entries[uid]
        assert entry.state is State.LOADING, entry
        entry.state = State.FAILED
        # A new exception: the old one's traceback would keep the reader's frames, and all that they hold, alive.
        entry.error = _unavailable(entry.name, error.message, error.reason)
        if self._replacing.get(entry.name) is entry:
            del self._replacing[entry.name]
            self._forget(entry)
        self._changed(entry)
        self.tiers.failed(entry, self._for_clients(entry.name, entry.error))
        return entry

    def _for_clients(self, name: str, error: LoramuxError) -> LoramuxError:
        """A new error of the same meaning, without the server's paths: those are for operators."""
        text = error.message
        for path in self.private:
            text = text.replace(f"{path}/", "").replace(path, "(on the server)")
        if isinstance(error, AdapterUnavailable):
            return AdapterUnavailable(text, reason=error.reason, metadata=error.metadata)
        if isinstance(error, PathNotAllowed):
            return PathNotAllowed(text, metadata={"adapter": name})
        return error

    def unload(self, name: str, *, by_operator: bool = False) -> AdapterEntry:
        """Take the name away: READY or REGISTERED → DRAINING, and UNLOADED at once if no request holds it; FAILED →
        UNLOADED. Who asks for what was unloaded `by_operator` is told so.

        Loads of the name must have ended before. Raises AdapterNotFound.
        """
        entry = self.get(name)
        assert self.loading(name) is None, f"the load of {name} runs"
        self._take_name(entry)
        if by_operator:
            self._unloaded[name] = entry.source
            if len(self._unloaded) > _MOST_UNLOADED:
                del self._unloaded[next(iter(self._unloaded))]
        self._retire(entry)
        return entry

    def pin(self, name: str, pinned: bool) -> AdapterEntry:
        """Pin or unpin what `name` means now. Raises AdapterNotFound."""
        entry = self.get(name)
        if entry.pinned is not pinned:
            entry.pinned = pinned
            self._changed(entry)
            self.tiers.advance()
        return entry

    def _retire(self, entry: AdapterEntry) -> None:
        """The name means something else, or nothing: who leased it is served to the end."""
        if entry.state is State.FAILED:
            self._drop(entry)
            return
        assert entry.state in (State.READY, State.REGISTERED), entry
        entry.state = State.DRAINING
        self._changed(entry)
        if not entry.leases:
            self._drop(entry)

    def _drop(self, entry: AdapterEntry) -> None:
        assert entry.state in (State.DRAINING, State.FAILED), entry
        assert entry.state is State.FAILED or not entry.leases, entry
        if self._names.get(entry.name) is entry:
            self._take_name(entry)
        self._forget(entry)
        self.tiers.drop(entry)
        entry.state = State.UNLOADED
        self._changed(entry)

    def _keep(self, entry: AdapterEntry) -> None:
        self._entries[entry.uid] = entry
        self._ordered = None

    def _forget(self, entry: AdapterEntry) -> None:
        del self._entries[entry.uid]
        self._ordered = None

    def _give_name(self, entry: AdapterEntry) -> None:
        self._names[entry.name] = entry
        self._unloaded.pop(entry.name, None)
        self._near.add(entry.name)

    def _take_name(self, entry: AdapterEntry) -> None:
        del self._names[entry.name]
        self._near.remove(entry.name)

    # What is known of files.

    def moved(self, entry: AdapterEntry, source: str) -> None:
        """The same files lie at `source`."""
        if entry.source != source:
            entry.source = source
            self._changed(entry)

    def mark_irreplaceable(self, entry: AdapterEntry, irreplaceable: bool) -> None:
        """Whether what is in memory cannot be read again, because its files have changed."""
        entry.irreplaceable = irreplaceable

    def notice(self, entry: AdapterEntry, text: str) -> None:
        """`text` (empty: nothing any more) about its folder is among what operators are told of an adapter."""
        if text != entry.notice:
            entry.warnings = (*(w for w in entry.warnings if w != entry.notice), *((text,) if text else ()))
            entry.notice = text
            self._changed(entry)

    # Those who want to know.

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(entry)` after every change of state; it must be quick and not raise.

        Returns the way to stop.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def subscribe(self, *, limit: int = 4096) -> Subscription[AdapterEntry]:
        """Every entry as it is now, then changes; see Subscription."""
        entries = self.entries()
        subscription: Subscription[AdapterEntry] = Subscription(limit + len(entries))
        for entry in entries:
            subscription.put(entry.uid, entry)
        stop = self.listen(lambda entry: subscription.put(entry.uid, entry))
        subscription.on_close = stop
        return subscription

    def _changed(self, entry: AdapterEntry) -> None:
        for listener in tuple(self._listeners):
            listener(entry)

    def check(self) -> None:
        """Assert everything that always holds. For tests, and for the server when it is idle."""
        for name, entry in self._names.items():
            assert entry.name == name
            assert self._entries[entry.uid] is entry
            assert entry.state not in (State.DRAINING, State.UNLOADED), entry
        for name, entry in self._replacing.items():
            assert entry.name == name
            assert entry.state is State.LOADING, entry
            assert self._entries[entry.uid] is entry
            assert self._names[name].state is not State.LOADING, "only one load of a name runs"
        for uid, entry in self._entries.items():
            assert entry.uid == uid
            named = self._names.get(entry.name) is entry or self._replacing.get(entry.name) is entry
            assert named is (entry.state is not State.DRAINING), entry
            assert entry.weights is None or entry.state in (State.READY, State.DRAINING), entry
            assert entry.weights is not None or not entry.held, entry
            assert (entry.error is not None) is (entry.state is State.FAILED), entry
            assert entry.leases or entry.state is not State.DRAINING, "drained, but not dropped"
            assert entry.state in (State.READY, State.DRAINING) or entry.nbytes == 0, entry
        assert self.budget.used == sum(entry.nbytes for entry in self._entries.values())
        self.tiers.check()


def _stays(error: LoramuxError, entry: AdapterEntry) -> bool:
    """Whether it would come again with each request: the adapter's files, where they lie, or what reading them for the
    first time came upon."""
    if entry.state is State.REGISTERED and error.reason == LOAD_FAILED:
        return True
    return isinstance(error, InvalidAdapter | PathNotAllowed) and entry.state in (State.REGISTERED, State.READY)


def _unavailable(name: str, why: str, cause: str) -> AdapterUnavailable:
    prefix = f"adapter {name!r} failed to load: "
    return AdapterUnavailable(prefix + why.removeprefix(prefix), metadata={"adapter": name, "cause": cause})

"""Which adapters are where the model computes, what is put out for them, and whose turn it is. Imports no torch.

Rules without files, tensors or waiting, like the registry's: every method is one step of the event loop's thread.

Two budgets of bytes: the device's and the host's. What is put out of the device goes to the host if there is room,
else only its files are left. A request takes its turn when all its adapters are on the device, and they stay until it
ends. So two mixes can never hold one half each, and no adapter is taken from under a request.

Turns are given oldest first. A younger request whose adapters happen to be there may pass an older one that waits for
memory, but not for longer than `patience` seconds: then the running ones end, and the memory is the older one's.

What is put out is what is worth least by GreedyDual-Size-Frequency (Cherkasova 1998): uses × cost of a load / bytes,
plus the worth of what was put out last, so that old fame fades. What could not be read again goes last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loramux.errors import LoramuxError, Overloaded
from loramux.lora.budget import ByteBudget
from loramux.lora.entry import AdapterEntry, Lease, LoadedAdapter, Residency

_LEAST_COST = 0.002  # seconds; a load that was too quick to measure still costs something


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that waits for its adapters, all of them; `since` is in the clock's seconds."""

    leases: Sequence[Lease]
    since: float


class Tiers:
    """`device_limit` and `host_limit` are bytes, None is no bound; a host limit of 0 keeps nothing.

    `measure(entry)` and `fetch(entry)` start work elsewhere, which ends with `measured` or `arrived`, or with `failed`.
    `changed(entry)` hears of evictions, and `turn()` is called when requests may have got their adapters, or errors.
    """

    def __init__(
        self,
        device_limit: int | None = None,
        host_limit: int | None = 0,
        *,
        patience: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = ByteBudget(device_limit)
        self.host = ByteBudget(host_limit)
        self.measure: Callable[[AdapterEntry], None] = _nobody
        self.fetch: Callable[[AdapterEntry], None] = _nobody
        self.changed: Callable[[AdapterEntry], None] = _nobody
        self.turn: Callable[[], None] = lambda: None
        self.evictions = 0
        self.lookups = dict.fromkeys(Residency, 0)  # where adapters were when requests asked for them
        self._patience = patience
        self._clock = clock
        self._waiting: dict[str, Ticket] = {}  # by request, the oldest first
        self._busy: set[str] = set()  # uids that are being measured or fetched
        self._resident: dict[str, AdapterEntry] = {}
        self._hosted: dict[str, AdapterEntry] = {}
        self._worth_gone = 0.0
        self._moving = False
        self._again = False

    @property
    def waiting(self) -> int:
        """Requests that have no turn yet."""
        return len(self._waiting)

    # Requests.

    def enter(self, request_id: str, leases: Sequence[Lease]) -> None:
        """Queue a request for all of `leases` at once; each gets `weights` in one moment, or one gets an `error`."""
        for lease in leases:
            entry = lease.entry
            self.lookups[entry.residency] += 1
            entry.uses += 1
            entry.worth = self._worth(entry)
        self._waiting[request_id] = Ticket(tuple(leases), self._clock())
        self.advance()

    def leave(self, request_id: str) -> None:
        """The request has ended, whether it had its turn or not."""
        self._waiting.pop(request_id, None)
        self.advance()

    # Adapters.

    def room(self, owner: str, nbytes: int, *, what: str) -> None:
        """Reserve bytes of the device for `owner` at once, putting out what no request holds or waits for.

        Raises Overloaded (ADAPTER_BUDGET_EXCEEDED), and then changes nothing.
        """
        wanted = {lease.uid for ticket in self._waiting.values() for lease in ticket.leases}
        victims = self._victims(nbytes - self.device.reserved_by(owner), keep=wanted, last={})
        if victims is not None:
            self._evict(victims)
        self.device.reserve(owner, nbytes, what=what)

    def arrived(self, entry: AdapterEntry, loaded: LoadedAdapter) -> None:
        """`loaded` is on the device. Raises Overloaded if it is larger than was reserved and there is no room."""
        if loaded.nbytes > self.device.reserved_by(entry.uid):
            self.room(entry.uid, loaded.nbytes, what=f"adapter {entry.name!r}")
        self.device.take(entry.uid, loaded.nbytes, what=f"adapter {entry.name!r}")
        self._forget_host(entry)
        self._busy.discard(entry.uid)
        entry.size = entry.nbytes = loaded.nbytes
        entry.worth = self._worth(entry)
        entry.loaded = loaded
        entry.residency = Residency.DEVICE
        entry.weights = loaded.weights
        self._resident[entry.uid] = entry

    def measured(self, entry: AdapterEntry, nbytes: int) -> None:
        """`entry` will take so many bytes."""
        entry.size = nbytes
        self._busy.discard(entry.uid)
        self.advance()

    def failed(self, entry: AdapterEntry, error: LoramuxError) -> None:
        """Measuring or fetching ended with `error`: for all that wait for the entry now."""
        self._busy.discard(entry.uid)
        if entry.uid not in self._hosted:
            self._forget_host(entry)  # it was on its way from there
        for lease in entry.leases.values():
            if lease.weights is None:
                lease.error = error
        self.advance()

    def revoke(self, entry: AdapterEntry, error: LoramuxError) -> None:
        """Who holds the entry and has not started to compute ends with `error`, on the way to the engine or in it."""
        for lease in entry.leases.values():
            if lease.error is None:
                lease.error = error
        self.advance()

    def drop(self, entry: AdapterEntry) -> None:
        """The entry is gone: nothing of it stays in any memory."""
        self._forget_host(entry)
        if self._resident.pop(entry.uid, None) is not None:
            self.device.give_back(entry.uid)
        entry.weights = entry.loaded = None
        entry.residency = Residency.DISK
        self.advance()

    def advance(self) -> None:
        """Give turns to whom memory allows, oldest first, and start the work that others wait for."""
        self._again = True
        if self._moving:  # a callback has come back
            return
        self._moving = True
        try:
            while self._again:
                self._again = False
                self._move()
        finally:
            self._moving = False
        self.turn()

    def _move(self) -> None:
        wanted_last = {lease.uid: i for i, t in enumerate(reversed(self._waiting.values())) for lease in t.leases}
        keep: set[str] = set()
        blocked: Ticket | None = None
        for request_id, ticket in tuple(self._waiting.items()):
            if any(lease.error is not None for lease in ticket.leases):
                del self._waiting[request_id]
                continue
            keep.update(lease.uid for lease in ticket.leases)
            if all(lease.entry.weights is not None for lease in ticket.leases):
                if blocked is None or self._clock() - blocked.since < self._patience:
                    self._give_turn(request_id, ticket)
            elif not self._start(ticket, keep, wanted_last, may_reserve=blocked is None) and blocked is None:
                blocked = ticket

    def _give_turn(self, request_id: str, ticket: Ticket) -> None:
        del self._waiting[request_id]
        for lease in ticket.leases:
            lease.weights = lease.entry.weights

    def _start(self, ticket: Ticket, keep: set[str], last: dict[str, int], *, may_reserve: bool) -> bool:
        """Start what the ticket's adapters need; False if one of them must wait for memory."""
        for lease in ticket.leases:
            entry = lease.entry
            if entry.weights is not None or entry.uid in self._busy or entry.loading:
                continue
            if entry.size is None:
                self._busy.add(entry.uid)
                self.measure(entry)
                continue
            if not may_reserve:
                return False
            error = self._never_fits(ticket)
            if error is not None:
                lease.error = error
                self._again = True
                return True
            victims = self._victims(entry.size, keep=keep, last=last)
            if victims is None:
                return False
            if self._hosted.pop(entry.uid, None) is not None:
                self.host.give_back(entry.uid)  # on its way: what is put out may have its place
            self._evict(victims)
            self.device.reserve(entry.uid, entry.size, what=f"adapter {entry.name!r}")
            self._busy.add(entry.uid)
            self.fetch(entry)
        return True

    def _never_fits(self, ticket: Ticket) -> Overloaded | None:
        """Why the ticket's adapters can never be on the device together, if so."""
        if self.device.limit is None:
            return None
        own = {lease.uid: lease.entry for lease in ticket.leases}
        pinned = sum(e.nbytes for e in self._resident.values() if e.pinned and e.uid not in own)
        needed = sum(e.size or 0 for e in own.values())
        if needed + pinned <= self.device.limit:
            return None
        return self.device.exceeded(needed, pinned, what=f"adapter {next(iter(own.values())).name!r}")

    # What is put out.

    def _victims(self, nbytes: int, *, keep: Iterable[str], last: dict[str, int]) -> list[AdapterEntry] | None:
        """Whom to put out so that `nbytes` are free; None if that cannot be now.

        Never what a request holds, what is pinned, or who is in `keep`. Of those that others wait for, the ones
        that are needed latest come first: `last` has their place, counted from the end.
        """
        if self.device.limit is None:
            return []
        over = self.device.used + self.device.reserved + nbytes - self.device.limit
        if over <= 0:
            return []
        kept = set(keep)
        free = [e for e in self._resident.values() if not (e.pinned or e.held or e.uid in kept)]
        free.sort(key=lambda e: (e.irreplaceable, last.get(e.uid, -1), e.worth))
        victims = []
        for entry in free:
            victims.append(entry)
            over -= entry.nbytes
            if over <= 0:
                return victims
        return None

    def _evict(self, victims: Iterable[AdapterEntry]) -> None:
        for entry in victims:
            self.evictions += 1
            self._worth_gone = max(self._worth_gone, entry.worth)
            loaded = entry.loaded
            del self._resident[entry.uid]
            self.device.give_back(entry.uid)
            entry.weights = entry.loaded = None
            entry.nbytes = 0
            entry.uses = 0
            entry.residency = Residency.DISK
            if loaded is not None and loaded.on_host is not None:
                self._keep_on_host(entry, loaded.on_host)
            self.changed(entry)

    def _keep_on_host(self, entry: AdapterEntry, loaded: LoadedAdapter) -> None:
        limit = self.host.limit
        if limit is not None:
            if loaded.nbytes > limit:
                return
            for other in sorted(self._hosted.values(), key=lambda e: (e.irreplaceable, e.worth)):
                if self.host.used + loaded.nbytes <= limit:
                    break
                if other.irreplaceable and not entry.irreplaceable:
                    return
                self._forget_host(other)
                self.changed(other)
        self.host.take(entry.uid, loaded.nbytes, what=f"adapter {entry.name!r}")
        self._hosted[entry.uid] = entry
        entry.hosted = loaded
        entry.residency = Residency.HOST

    def _forget_host(self, entry: AdapterEntry) -> None:
        if self._hosted.pop(entry.uid, None) is not None:
            self.host.give_back(entry.uid)
        entry.hosted = None
        if entry.residency is Residency.HOST:
            entry.residency = Residency.DISK

    def _worth(self, entry: AdapterEntry) -> float:
        return self._worth_gone + entry.uses * (entry.load_seconds + _LEAST_COST) / max(1, entry.size or 1)

    def check(self) -> None:
        """Assert what always holds."""
        self.device.check()
        self.host.check()
        for uid, entry in self._resident.items():
            assert entry.uid == uid
            assert entry.weights is not None, entry
            assert entry.residency is Residency.DEVICE, entry
            assert entry.hosted is None, entry
        for uid, entry in self._hosted.items():
            assert entry.uid == uid
            assert entry.hosted is not None, entry
            assert entry.weights is None, entry
            assert entry.residency is Residency.HOST, entry
        assert self.device.used == sum(entry.nbytes for entry in self._resident.values())
        assert not self._resident.keys() & self._hosted.keys()
        for ticket in self._waiting.values():
            assert all(lease.weights is None for lease in ticket.leases), "half a turn"


def _nobody(entry: AdapterEntry) -> None:
    """Stands where nobody listens."""

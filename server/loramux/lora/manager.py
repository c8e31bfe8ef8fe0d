"""What operators do with adapters while the server runs: load, replace, unload, pin, watch. Imports no torch.

Runs on the event loop and does the waiting that the registry does not. Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loramux.errors import Cancelled, DeadlineExceeded
from loramux.lora.catalog import Catalog
from loramux.lora.declaration import Declaration
from loramux.lora.entry import AdapterEntry, LoadedAdapter, State
from loramux.lora.folder import AdapterFolder
from loramux.lora.limits import ReadLimits
from loramux.lora.loader import Loader
from loramux.lora.manifest import Declared
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import WEIGHTS_FILE, AdapterRoots, check_name
from loramux.lora.subscription import Subscription


class Unloaded(NamedTuple):
    """What an unload gave: bytes freed on the device, and how many requests were cancelled for it."""

    freed_bytes: int
    cancelled: int


class AdapterManager:
    """Used by one event loop, in its thread.

    `read(folder)` reads, checks and places an adapter; `measure(folder)` says beforehand how many bytes it will take
    (the weights file's size, if not given). Both run in a worker and may raise any LoramuxError. `load_timeout` is in
    seconds, and so are `cancel_grace`, how long cancelled requests may take to end, and `scan_interval`, see Catalog;
    None leaves what lies under the roots alone until somebody loads it. `declared_in` is an adapters file, see
    lora.manifest.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        roots: AdapterRoots,
        read: Callable[[AdapterFolder], LoadedAdapter],
        *,
        measure: Callable[[AdapterFolder], int] | None = None,
        limits: ReadLimits | None = None,
        load_timeout: float = 300.0,
        scan_interval: float | None = None,
        declared_in: Path | None = None,
        cancel_grace: float = 30.0,
        workers: int = 2,
        place: Callable[[Any], LoadedAdapter] | None = None,
    ) -> None:
        self.registry = registry
        registry.private = tuple(map(str, roots.allowed))
        self._loader = Loader(
            registry,
            roots,
            read,
            measure or _file_size,
            limits=limits or ReadLimits(),
            timeout=load_timeout,
            workers=workers,
            place=place,
        )
        self._catalog: Catalog | None = None
        if scan_interval is not None:
            self._catalog = Catalog(registry, roots.paths, self._loader, interval=scan_interval)
        self._declaration: Declaration | None = None
        if declared_in is not None:
            follow = self._catalog.follow if self._catalog is not None else lambda name, path: None
            self._declaration = Declaration(
                declared_in, registry, roots, self._load_declared, scan_interval or 0.0, follow
            )
        self._cancel_grace = cancel_grace
        self._gone: dict[str, asyncio.Event] = {}  # uid → set when a draining entry is dropped
        self._watchers: set[Subscription[AdapterEntry]] = set()
        self._closed = False
        self._unlisten = registry.listen(self._changed)

    async def start(self) -> None:
        """Register what lies under the roots and what is declared, and keep looking.

        Raises StartupError if the adapters file cannot be read.
        """
        if self._catalog is not None:
            await self._catalog.start()
        if self._declaration is not None:
            await self._declaration.start()

    async def reload(self) -> None:
        """Look at the roots and the adapters file now; what is wrong with them is logged."""
        if self._catalog is not None:
            await self._catalog.look(now=True)
        if self._declaration is not None:
            await self._declaration.tell()

    async def _load_declared(self, declared: Declared) -> AdapterEntry:
        source = declared.source or declared.name
        entry, _ = await self._loader.load(
            declared.name,
            source,
            replace=True,
            pin=True,
            digest=declared.digest or None,
            managed=not declared.digest,
            quiet=True,
        )
        return entry

    async def load(
        self,
        name: str,
        source: str = "",
        *,
        replace: bool = False,
        pin: bool = False,
        validate_only: bool = False,
    ) -> tuple[AdapterEntry, bool]:
        """Load the folder `source` (empty: the folder `name`) and give it the name.

        Returns the entry, and whether the same content was loaded under this name already. Loads of one name run one
        after another. Who waits here may go away: the load goes on, and asking again finds its result. A replacement
        stays pinned if what it replaces was. With `validate_only` the adapter is read and dropped, and the entry,
        which is in no registry, describes it.

        Raises InvalidRequest, PathNotAllowed, InvalidAdapter; AdapterExists for other content without `replace`;
        Overloaded if the bytes do not fit; DeadlineExceeded after `load_timeout`; Cancelled if the adapter is
        unloaded meanwhile; Draining after `close`; AdapterUnavailable for a defect, whose traceback is in the log.
        """
        check_name(name)
        if validate_only:
            return await self._loader.validate(name, source or name), False
        return await self._loader.load(name, source or name, replace=replace, pin=pin)

    async def unload(
        self,
        name: str,
        *,
        drain_timeout: float | None = None,
        cancel_after_timeout: bool = False,
        cancel: Callable[[str], None] | None = None,
    ) -> Unloaded:
        """Take the name away, wait until no request holds the adapter, and free it.

        A load of the name that runs is aborted first. After `drain_timeout` seconds (None: no bound) the requests
        that still run are cancelled through `cancel(request_id)` if `cancel_after_timeout`, else DeadlineExceeded is
        raised and the drain goes on. Unloading a name that is gone but still drains joins that drain, so that an
        operator whose first call timed out can cancel with a second one; it reports the same bytes. Who waits here
        may go away: the drain goes on. Raises AdapterNotFound.
        """
        why = f"adapter {name!r} was unloaded while it was loading"
        aborted = await self._loader.abort(name, Cancelled(why, reason="ADAPTER_UNLOADED"))
        if self.registry.find(name) is not None:
            entries = [self.registry.unload(name, by_operator=True)]
        else:
            entries = self.registry.draining(name)
            if not entries and not aborted:
                self.registry.get(name)  # raises
        if await self._drained(entries, drain_timeout):
            return Unloaded(_freed(entries), 0)
        if not cancel_after_timeout:
            then = "the drain goes on; unload again to wait or to cancel"
            raise _still_used(name, entries, drain_timeout, then)
        assert cancel is not None, "cancel_after_timeout needs the way to cancel a request"
        requests = {request for entry in entries for request in entry.leases}
        # A request that is still on its way to the engine is none that `cancel` could find; its lease stops it there.
        stopped = Cancelled("an operator unloaded this request's adapter", reason="ADAPTER_UNLOADED")
        for entry in entries:
            self.registry.tiers.revoke(entry, stopped)
        for request in requests:
            cancel(request)
        if not await self._drained(entries, self._cancel_grace):
            raise _still_used(name, entries, self._cancel_grace, "they were cancelled and have not ended yet")
        return Unloaded(_freed(entries), len(requests))

    def get(self, name: str) -> AdapterEntry:
        """What `name` means now. Raises AdapterNotFound."""
        return self.registry.get(name)

    async def folder(self, entry: AdapterEntry) -> AdapterFolder:
        """The folder of its files. Raises what `load` raises for a source that may not be read or is not there."""
        return await self._loader.folder(entry)

    async def chat_template(self, uid: str) -> str | None:
        """The adapter's own template for messages, as it was loaded, or will be; None: the base's."""
        entry = self.registry.by_uid(uid)
        if entry is None or entry.loaded_at:
            return None if entry is None else entry.chat_template
        return await self._loader.chat_template(entry)

    def pin(self, name: str, pinned: bool) -> AdapterEntry:
        """Pin or unpin. Raises AdapterNotFound."""
        return self.registry.pin(name, pinned)

    async def watch(self) -> AsyncGenerator[AdapterEntry, None]:
        """Every adapter as it is now, then each one that changes, until `close`.

        Slow readers see the latest state of each; one who falls far behind gets SlowReader (WATCH_TOO_SLOW).
        """
        subscription = self.registry.subscribe()
        self._watchers.add(subscription)
        try:
            if self._closed:
                subscription.close()
            while (entry := await subscription.next()) is not None:
                yield entry
        finally:
            self._watchers.discard(subscription)
            subscription.close()

    async def close(self, grace: float = 5.0) -> None:
        """Abort loads, end watches, and give workers `grace` seconds to finish.

        What is loaded stays loaded.
        """
        self._closed = True
        for watcher in (self._catalog, self._declaration):
            if watcher is not None:
                await watcher.close()
        await self._loader.close(grace)
        for subscription in tuple(self._watchers):
            subscription.close()
        self._unlisten()

    async def _drained(self, entries: Sequence[AdapterEntry], seconds: float | None) -> bool:
        """Wait until all are UNLOADED; False if `seconds` were too short."""
        # Events that the registry's own drop sets. Nothing is counted, so nothing can drift.
        draining = [entry for entry in entries if entry.state is State.DRAINING]
        waiting = [self._gone.setdefault(entry.uid, asyncio.Event()) for entry in draining]
        try:
            async with asyncio.timeout(seconds):
                for event in waiting:
                    await event.wait()
        except TimeoutError:
            return False
        return True

    def _changed(self, entry: AdapterEntry) -> None:
        if entry.state is State.UNLOADED and (event := self._gone.pop(entry.uid, None)) is not None:
            event.set()

    def list(self) -> Sequence[AdapterEntry]:
        """All adapters, draining ones included, by name."""
        return self.registry.entries()


def _freed(entries: Sequence[AdapterEntry]) -> int:
    """What they took when they went: one that was asked for may have come to the device during its drain only."""
    return sum(entry.nbytes for entry in entries)


def _still_used(name: str, entries: Sequence[AdapterEntry], seconds: float | None, then: str) -> DeadlineExceeded:
    requests = len({request for entry in entries for request in entry.leases})
    return DeadlineExceeded(
        f"adapter {name!r} still serves {requests} request(s) after {seconds:g} s; {then}",
        reason="ADAPTER_STILL_IN_USE",
        metadata={"adapter": name, "requests": requests},
    )


def _file_size(folder: AdapterFolder) -> int:
    path = folder.path / WEIGHTS_FILE
    return path.stat().st_size if path.is_file() else 0  # reading says what is wrong

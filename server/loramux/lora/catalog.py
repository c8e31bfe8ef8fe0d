"""The adapters that lie under the roots, known by their folders' names, and looked after while the server runs.

A folder directly under a root, with both files, is registered under its own name; it is read when a request first asks
for it. New folders appear, and removed ones drain and go. A folder that changes is taken over once it has been still
for some looks and loads; until then, and if it does not, the version that serves goes on serving. Requests that have
started finish on what they leased. What an operator loads from elsewhere under a folder's name is left alone; what is
loaded from the folder of that name, or unloaded, is looked after again once that changes. `follow` adds folders that
lie elsewhere, under names of their own.

Roots are looked at every `interval` seconds, in a worker: that works on any file system, network ones included, where
notifications do not. Imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loramux.errors import Cancelled, DeadlineExceeded, Draining, LoramuxError, Overloaded
from loramux.lora.entry import AdapterEntry, State
from loramux.lora.loader import Loader
from loramux.lora.pieces import pieces
from loramux.lora.registry import AdapterRegistry
from loramux.lora.scan import Found, Identity, Look, identity_of, scan
from loramux.lora.told_once import ToldOnce

log = logging.getLogger(__name__)

# Looks, one after another, that must find a changed folder, or its place empty, as the look before did. rsync and scp
# copy one file after the other, and seconds may lie between them.
_STILL = 2
_LONGEST_PAUSE = 64  # looks between two tries of what may work later
_RETRY = 12  # looks until a failed adapter is tried again whose files may not be at fault
_MAY_PASS = frozenset({"ADAPTER_FILES_UNREADABLE", "ADAPTER_FILES_CHANGED", "ADAPTER_LOAD_FAILED"})


@dataclass(slots=True, eq=False)
class _Change:
    """A folder that differs from what its name stands for. `over` is set when it has been dealt with."""

    looks: int = 0  # that found it as it was; below zero: a pause
    failures: int = 0
    contents: Identity | None = None  # at the last look
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Catalog:
    """Keeps a registry in step with folders. Used by one event loop, in its thread."""

    def __init__(self, registry: AdapterRegistry, roots: Sequence[Path], loader: Loader, *, interval: float) -> None:
        self._registry = registry
        self._roots = tuple(roots)
        self._loader = loader
        self._interval = interval
        self._found: dict[str, Found] = {}
        self._missed: dict[str, int] = {}  # looks that did not find a folder any more
        self._half: set[str] = set()
        self._followed: dict[str, str] = {}
        self._changes: dict[str, _Change] = {}
        self._failed: dict[str, tuple[AdapterEntry, int]] = {}  # and looks since
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._taking: asyncio.Task[None] | None = None
        self._told = ToldOnce(log)
        self._told_folders = ToldOnce(log)
        loader.still = self._until_still
        self._unlisten = registry.listen(self._entry_changed)

    def follow(self, name: str, path: str | None) -> None:
        """Look after the folder `path` as that of `name`, which stays when it goes away; None: no more."""
        if path is not None:
            self._followed[name] = path
        else:
            self._followed.pop(name, None)

    def _looked_after(self, entry: AdapterEntry) -> bool:
        """Whether its folder's changes are its own."""
        found = self._found.get(entry.name)
        return not entry.fixed and (entry.managed or (found is not None and found.path == entry.source))

    async def start(self) -> None:
        """Look once, then every `interval` seconds until `close`; never again if that is 0."""
        await self.look()
        if self._interval > 0:
            self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop looking."""
        self._unlisten()
        tasks = [task for task in (self._task, self._taking) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def look(self, *, now: bool = False) -> None:
        """Compare the roots with the registry, once. `now`: an operator says that nothing is being written; on return
        what changed has been taken over, or told."""
        async with self._looking:
            first = not self._found
            look = await asyncio.to_thread(
                scan, self._roots, self._found, frozenset(self._changes), dict(self._followed)
            )
            gone = self._gone(look, now)
            self._found = look.found
            self._tell(look, first)
            await self._each(gone, self._remove)
            await self._each(look.appeared, self._add)
            await self._each(look.changed, self._change)
            await self._try_failed_again()
            self._count(look, now)
        if now and self._taking is not None:
            await asyncio.wait([self._taking])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.look()
            except Exception as error:
                self._told.tell("watch", f"looking for adapters failed: {error!r}", traceback=error)
            else:
                self._told.forget("watch")

    async def _each(self, names: Iterable[str], act: Callable[[str], None]) -> None:
        """In pieces, between which others have the loop; one that fails is told, and fails alone."""
        for piece in pieces(names):
            for name in piece:
                try:
                    act(name)
                except Exception as error:
                    self._told.tell(name, f"looking after adapter {name!r} failed: {error!r}", traceback=error)
            await asyncio.sleep(0)

    def _tell(self, look: Look, first: bool) -> None:
        """Log what is new of what cannot be served; who asks for it is told why, too."""
        self._registry.unfit = look.skipped
        # A folder with one of the files is told if it stays so: the other may be on its way.
        told = {n: w for n, w in look.skipped.items() if first or n not in look.half or n in self._half}
        self._half = look.half
        texts = {n: f"the folder {n!r} under the adapter roots is not served: it {why}" for n, why in told.items()}
        for root, why in look.unread.items():
            texts[f"{root}/"] = f"the adapter root {root} cannot be read: {why}; its adapters stay as they are"
        self._told_folders.tell_all(texts, "folders that are not served")

    # What differs from the look before.

    def _gone(self, look: Look, now: bool) -> list[str]:
        """Names whose folders have been away long enough; the others stay known."""
        gone = []
        missed = {name: self._missed.get(name, 0) + 1 for name in look.gone}
        for name, looks in missed.items():
            if now or looks >= _STILL:
                gone.append(name)
            else:
                look.found[name] = self._found[name]
        self._missed = {name: looks for name, looks in missed.items() if name in look.found}
        return gone

    def _add(self, name: str) -> None:
        if self._registry.find(name) is None:
            self._registry.register(name, self._found[name].path)

    def _remove(self, name: str) -> None:
        self._over(name)
        current = self._registry.find(name)
        if current is not None and current.managed and self._registry.loading(name) is None:
            self._registry.unload(name)

    def _change(self, name: str) -> None:
        current = self._registry.find(name)
        if current is None:
            self._registry.register(name, self._found[name].path)
            return
        if not self._looked_after(current):
            return
        change = self._changes.setdefault(name, _Change())
        change.looks = change.failures = 0
        if current.state is State.READY:
            self._registry.mark_irreplaceable(current, True)

    def _count(self, look: Look, now: bool) -> None:
        """See which of the changed folders have been still for long enough, and take these over."""
        for name, change in self._changes.items():
            contents = look.contents.get(name)
            if contents is not None and change.contents not in (None, contents):
                change.looks = min(change.looks, 0)
            elif name not in look.changed:
                change.looks += 1
            change.contents = contents
            if now:
                change.looks = _STILL
            # Nobody can serve from it any more; who asks from now on waits until the folder is still.
            current = self._registry.find(name)
            if current is not None and self._looked_after(current) and current.state is State.FAILED:
                path = self._found[name].path
                self._registry.register(name, path, pinned=current.pinned, managed=current.managed)
        if (self._taking is None or self._taking.done()) and any(self._due()):
            self._taking = asyncio.create_task(self._take_all_over())

    def _due(self) -> Iterable[str]:
        return (name for name, change in self._changes.items() if change.looks >= _STILL)

    # Taking over what is still.

    async def _take_all_over(self) -> None:
        """One after another: what requests wait for comes first."""
        for name in list(self._due()):
            try:
                await self._take_over(name)
            except Exception as error:
                self._told.tell(name, f"taking over the folder of adapter {name!r} failed: {error!r}", traceback=error)
                self._over(name)

    async def _take_over(self, name: str) -> None:
        change, found, current = self._changes.get(name), self._found.get(name), self._registry.find(name)
        if change is None or change.looks < _STILL or self._registry.loading(name) is not None:
            return  # at another look
        if found is None or current is None or not self._looked_after(current):
            self._over(name)
            return
        if current.state is not State.READY:  # nothing of it was read yet
            self._registry.moved(current, found.path)
            self._over(name)
            return
        try:
            same = await self._load(current, found.path)
        except (Cancelled, Draining):  # an operator unloaded or replaced it meanwhile
            self._over(name)
        except LoramuxError as error:
            self._keep(current, change, error)
        else:
            if change.looks < _STILL:
                return  # it went on changing; that comes to its turn
            if same:
                self._registry.moved(current, found.path)
            else:
                log.info("adapter %r: its changed folder %s serves from now on", name, found.path)
            self._over(name)

    async def _load(self, current: AdapterEntry, path: str) -> bool:
        """Give the name to what lies at `path`, unless that is the same; whether it is."""
        if current.residency is not current.residency.DISK:
            entry, _ = await self._loader.load(
                current.name,
                path,
                replace=True,
                pin=current.pinned,
                instead_of=current,
                managed=current.managed,
                quiet=True,
            )
            return entry is current
        # Of that version nothing is left that could serve. The next request reads what lies there now.
        if await self._loader.holds(path, current):
            return True
        if self._registry.find(current.name) is current and self._registry.loading(current.name) is None:
            self._registry.register(current.name, path, pinned=current.pinned, managed=current.managed)
        return False

    def _keep(self, current: AdapterEntry, change: _Change, error: LoramuxError) -> None:
        """The older version serves on."""
        name = current.name
        text = (
            f"its folder has changed and does not load, so the version {current.digest} that was loaded before goes on "
            f"serving: {error.message}"
        )
        self._told.tell(name, f"adapter {name!r}: {text}")
        self._registry.notice(current, text)
        if error.reason in _MAY_PASS or isinstance(error, Overloaded | DeadlineExceeded):
            change.failures += 1
            change.looks = -min(1 << change.failures, _LONGEST_PAUSE)
        else:  # until it changes again
            del self._changes[name]
            change.over.set()

    def _over(self, name: str) -> None:
        """Nothing differs any more."""
        change = self._changes.pop(name, None)
        if change is not None:
            change.over.set()
        self._told.forget(name)
        current = self._registry.find(name)
        if current is not None:
            self._registry.notice(current, "")
            self._registry.mark_irreplaceable(current, False)

    # What requests wait for.

    async def _until_still(self, entry: AdapterEntry) -> None:
        """Wait while the folder of a version that was never read is being written: half of it might load."""
        found = self._found.get(entry.name)
        if self._interval <= 0 or found is None or found.path != entry.source:
            return
        change = self._changes.get(entry.name)
        if change is None and await asyncio.to_thread(identity_of, found.path) != found.identity:
            change = self._changes.setdefault(entry.name, _Change())
        if change is not None:
            await change.over.wait()

    # What failed.

    def _entry_changed(self, entry: AdapterEntry) -> None:
        if entry.state is State.FAILED and self._registry.find(entry.name) is entry:
            self._failed.setdefault(entry.uid, (entry, 0))
        else:
            self._failed.pop(entry.uid, None)

    async def _try_failed_again(self) -> None:
        """What failed to load when it was asked for may be asked for again once its files changed, or after a while if
        these may not be at fault."""
        for piece in pieces(list(self._failed.values())):
            seen = await asyncio.to_thread(lambda piece=piece: [identity_of(entry.source) for entry, _ in piece])  # type: ignore[misc]
            for (entry, looks), identity in zip(piece, seen, strict=True):
                if self._failed.get(entry.uid) is None or not entry.read_as:
                    continue
                assert entry.error is not None
                again = entry.error.metadata.get("cause") in _MAY_PASS and looks + 1 >= _RETRY
                if identity == entry.read_as and not again:
                    self._failed[entry.uid] = entry, looks + 1
                    continue
                digest = "" if self._looked_after(entry) else entry.digest
                self._registry.register(
                    entry.name, entry.source, pinned=entry.pinned, digest=digest, managed=entry.managed
                )
                if not digest and identity != entry.read_as:
                    self._changes.setdefault(entry.name, _Change())

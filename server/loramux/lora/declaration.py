"""Brings a registry in line with an adapters file (lora.manifest), again whenever it changes. Imports no torch.

The file may name tens of thousands: it is read in a worker, and applied in pieces, between which others have the loop.
A changed file is applied once it has been still since the last look, so that half of one is not taken for all.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

from loramux.errors import AdapterUnavailable, LoramuxError, StartupError
from loramux.lora.entry import AdapterEntry
from loramux.lora.folder import AdapterFolder
from loramux.lora.manifest import Declared, read_manifest
from loramux.lora.pieces import pieces
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import AdapterRoots
from loramux.lora.told_once import ToldOnce

log = logging.getLogger(__name__)

Load = Callable[[Declared], Awaitable[AdapterEntry]]

_LOADS = 4  # pinned ones at a time
_LONGEST_PAUSE = 64  # looks between two tries of what failed


class Declaration:
    """Applies one file. Used by one event loop, in its thread.

    `load(declared)` loads and pins at once. `follow(name, folder)` looks after the folder of one without a digest,
    whose versions all count; None ends that. `interval`: seconds between looks at the file; 0 looks only when told to.
    """

    def __init__(
        self,
        path: Path,
        registry: AdapterRegistry,
        roots: AdapterRoots,
        load: Load,
        interval: float,
        follow: Callable[[str, str | None], None] = lambda name, path: None,
    ) -> None:
        self._path = path
        self._registry = registry
        self._roots = roots
        self._load = load
        self._interval = interval
        self._follow = follow
        self._applied: dict[str, Declared] = {}
        self._failed: dict[str, Declared] = {}
        self._pause = self._wait = 1  # looks until what failed is tried again
        self._seen: tuple[int, ...] = ()  # of the file that was applied
        self._last: tuple[int, ...] = ()  # at the last look
        self._applying = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._told = ToldOnce(log, level=logging.ERROR)

    async def start(self) -> None:
        """Apply the file. What cannot be had is logged and tried again, as after start: a server without one adapter is
        worth more than none. Raises StartupError if the file as a whole cannot be read."""
        self._seen = self._last = await asyncio.to_thread(_identity, self._path)
        errors = await self.apply()
        if "" in errors:
            raise StartupError(errors[""].message)
        self._report(errors)
        if self._interval > 0:
            self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def apply(self) -> Mapping[str, LoramuxError]:
        """Read the file and do what it says; what cannot be done leaves the rest to be done, and is returned by name.

        A file that cannot be read as a whole changes nothing; its error has the empty name.
        """
        async with self._applying:
            try:
                wanted = await asyncio.to_thread(read_manifest, self._path)
            except LoramuxError as error:
                return {"": error}
            for names in pieces(self._applied.keys() - wanted.keys()):
                for name in names:
                    self._follow(name, None)
                    if self._registry.find(name) is not None and self._registry.loading(name) is None:
                        self._registry.unload(name)
                await asyncio.sleep(0)
            self._applied = {name: old for name, old in self._applied.items() if name in wanted}
            self._pause = self._wait = 1
            return await self._bring_all(wanted.values())

    async def _bring_all(self, wanted: Iterable[Declared]) -> dict[str, LoramuxError]:
        errors: dict[str, LoramuxError] = {}
        failed: dict[str, Declared] = {}
        for piece in pieces(wanted):
            found = await self._bring(piece)
            errors |= found
            for declared in piece:
                (failed if declared.name in found else self._applied)[declared.name] = declared
        self._failed = failed
        return errors

    async def _bring(self, piece: Sequence[Declared]) -> dict[str, LoramuxError]:
        resolved = await asyncio.to_thread(self._resolve, piece)
        errors = {d.name: folder for d, folder in zip(piece, resolved, strict=True) if isinstance(folder, LoramuxError)}
        to_load = [
            declared
            for declared, folder in zip(piece, resolved, strict=True)
            if isinstance(folder, AdapterFolder) and self._place(declared, folder)
        ]
        for some in pieces(to_load, _LOADS):
            outcomes = await asyncio.gather(*(self._load_now(declared) for declared in some))
            errors |= {d.name: error for d, error in zip(some, outcomes, strict=True) if error is not None}
        return errors

    def _resolve(self, piece: Sequence[Declared]) -> list[AdapterFolder | LoramuxError]:
        """In a worker."""
        return [_tried(declared, lambda d=declared: self._roots.resolve(d.source or d.name)) for declared in piece]  # type: ignore[misc]

    def _place(self, declared: Declared, folder: AdapterFolder) -> bool:
        """Register what is declared, unless it is there; True if it is to be loaded at once."""
        current = self._registry.find(declared.name)
        # What is declared is there: by its digest, or without one by the folder it came from.
        there = current is not None and current.error is None
        if current is not None and there:
            there = current.digest == declared.digest if declared.digest else current.source == str(folder)
        self._follow(declared.name, None if declared.digest else str(folder))
        if declared.pin:
            return current is None or not there or not current.pinned
        if not there:
            if self._registry.loading(declared.name) is None:
                self._registry.register(declared.name, str(folder), digest=declared.digest, managed=not declared.digest)
        elif current is not None and current.pinned:
            self._registry.pin(declared.name, False)
        return False

    async def _load_now(self, declared: Declared) -> LoramuxError | None:
        try:
            await self._load(declared)
        except Exception as error:
            return _as_known(declared, error)
        return None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.look()
            except Exception as error:
                self._told.tell("watch", f"looking at {self._path} failed: {error!r}", traceback=error)
            else:
                self._told.forget("watch")

    async def look(self) -> None:
        """Apply the file if it changed and has been still since the last look; else try again what failed."""
        seen = await asyncio.to_thread(_identity, self._path)
        still, self._last = seen == self._last, seen
        if seen != self._seen:
            if still:
                self._seen = seen
                await self.tell()
        elif self._failed:
            await self._retry()

    async def _retry(self) -> None:
        """Once more what failed, after pauses that double: its folder may be there by now."""
        self._wait -= 1
        if self._wait > 0:
            return
        self._pause = self._wait = min(2 * self._pause, _LONGEST_PAUSE)
        async with self._applying:
            self._tell(await self._bring_all(list(self._failed.values())))

    async def tell(self) -> None:
        """Apply, and log what could not be done."""
        self._report(await self.apply())

    def _report(self, errors: Mapping[str, LoramuxError]) -> None:
        self._tell(errors)
        log.info("applied %s: %d adapters, %d errors", self._path, len(self._applied), len(errors))

    def _tell(self, errors: Mapping[str, LoramuxError]) -> None:
        texts = {n: f"{self._path}: adapter {n!r}: {e.message}" if n else e.message for n, e in errors.items()}
        self._told.tell_all(texts, "adapters that could not be had")


def _tried(declared: Declared, resolve: Callable[[], AdapterFolder]) -> AdapterFolder | LoramuxError:
    try:
        return resolve()
    except Exception as error:
        return _as_known(declared, error)


def _as_known(declared: Declared, error: Exception) -> LoramuxError:
    if isinstance(error, LoramuxError):
        return error
    log.error("bringing adapter %r failed", declared.name, exc_info=error)
    return AdapterUnavailable(f"adapter {declared.name!r}: {type(error).__name__}: {error}")


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

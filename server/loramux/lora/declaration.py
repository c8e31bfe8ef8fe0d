"""Brings a registry in line with an adapters file (lora.manifest), again whenever it changes. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from loramux.errors import LoramuxError
from loramux.lora.entry import AdapterEntry
from loramux.lora.manifest import Declared, read_manifest
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import AdapterRoots

log = logging.getLogger(__name__)

Load = Callable[[Declared], Awaitable[AdapterEntry]]


class Declaration:
    """Applies one file. Used by one event loop, in its thread.

    `load(declared)` loads and pins at once. `interval`: seconds between looks at the file; 0 looks only when told to.
    """

    def __init__(self, path: Path, registry: AdapterRegistry, roots: AdapterRoots, load: Load, interval: float) -> None:
        self._path = path
        self._registry = registry
        self._roots = roots
        self._load = load
        self._interval = interval
        self._applied: Mapping[str, Declared] = {}
        self._seen: tuple[int, ...] = ()
        self._applying = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Apply the file. Raises what is wrong with it or with a pinned adapter."""
        self._seen = await asyncio.to_thread(_identity, self._path)
        for error in await self.apply():
            raise error
        if self._interval > 0:
            self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def apply(self) -> list[LoramuxError]:
        """Read the file and do what it says; what cannot be done leaves the rest to be done, and is returned.

        A file that cannot be read as a whole changes nothing.
        """
        async with self._applying:
            try:
                wanted = await asyncio.to_thread(read_manifest, self._path)
            except LoramuxError as error:
                return [error]
            for name in self._applied.keys() - wanted.keys():
                if self._registry.find(name) is not None and self._registry.loading(name) is None:
                    self._registry.unload(name)
            outcomes = await asyncio.gather(*(self._bring(declared) for declared in wanted.values()))
            failed = {name for name, error in zip(wanted, outcomes, strict=True) if error is not None}
            self._applied = {name: declared for name, declared in wanted.items() if name not in failed}
            return [error for error in outcomes if error is not None]

    async def _bring(self, declared: Declared) -> LoramuxError | None:
        try:
            folder = await asyncio.to_thread(self._roots.resolve, declared.source or declared.name)
            current = self._registry.find(declared.name)
            # What is declared is there: by its digest, or without one by the folder it came from.
            there = current is not None and current.error is None
            if current is not None and there:
                there = current.digest == declared.digest if declared.digest else current.source == str(folder)
            if declared.pin:
                if current is None or not there or not current.pinned:
                    await self._load(declared)
            elif not there:
                if self._registry.loading(declared.name) is None:
                    self._registry.register(declared.name, str(folder), digest=declared.digest, managed=False)
            elif current is not None and current.pinned:
                self._registry.pin(declared.name, False)
        except LoramuxError as error:
            return error
        return None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            seen = await asyncio.to_thread(_identity, self._path)
            if seen != self._seen:
                self._seen = seen
                await self.tell()

    async def tell(self) -> None:
        """Apply, and log what could not be done."""
        errors = await self.apply()
        for error in errors:
            log.error("%s: %s", self._path, error.message)
        log.info("applied %s: %d adapters, %d errors", self._path, len(self._applied), len(errors))


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

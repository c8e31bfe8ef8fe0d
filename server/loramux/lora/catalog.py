"""The adapters that lie under the roots, known by their folders' names, and looked after while the server runs.

A folder directly under a root, with both files, is registered under its own name; it is read when a request first asks
for it. New folders appear, removed ones drain and go, changed ones are replaced: requests that have started finish on
what they leased. What an operator loads or unloads by hand is left alone until its folder changes. Imports no torch.

Roots are looked at every `interval` seconds, in a worker: that works on any file system, network ones included, where
notifications do not. A folder that is written to while it is read fails to load, and is tried again once it changes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from loramux.errors import InvalidRequest
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE, check_name

log = logging.getLogger(__name__)

Identity = tuple[int, ...]  # inode, size and change times of both files


class Catalog:
    """Keeps a registry in step with folders. Used by one event loop, in its thread."""

    def __init__(self, registry: AdapterRegistry, roots: Sequence[Path], *, interval: float) -> None:
        self._registry = registry
        self._roots = tuple(roots)
        self._interval = interval
        self._seen: dict[str, tuple[Path, Identity]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look once, then every `interval` seconds until `close`; never again if that is 0."""
        await self.look()
        if self._interval > 0:
            self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def look(self) -> None:
        """Compare the roots with the registry, once."""
        found, unread = await asyncio.to_thread(scan, self._roots)
        # A root that is away for a moment, say on a network, does not take its adapters with it.
        found = {name: seen for name, seen in self._seen.items() if seen[0].parent in unread} | found
        for name in self._seen.keys() - found.keys():
            self._remove(name)
        for name, seen in found.items():
            if self._seen.get(name) != seen:
                self._add(name, seen[0])
        self._seen = found

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.look()
            except Exception:
                log.exception("looking for adapters failed")

    def _add(self, name: str, folder: Path) -> None:
        current = self._registry.find(name)
        if current is None:
            self._registry.register(name, str(folder))
        elif current.managed and self._registry.loading(name) is None:
            self._registry.register(name, str(folder), pinned=current.pinned)

    def _remove(self, name: str) -> None:
        current = self._registry.find(name)
        if current is not None and current.managed and self._registry.loading(name) is None:
            self._registry.unload(name)


def scan(roots: Sequence[Path]) -> tuple[dict[str, tuple[Path, Identity]], set[Path]]:
    """Name → folder and identity of every adapter folder, of one name in two roots the first root's; and the roots that
    could not be read, which are logged."""
    found: dict[str, tuple[Path, Identity]] = {}
    unread: set[Path] = set()
    for root in roots:
        try:
            with os.scandir(root) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError as error:
            log.warning("the adapter root %s cannot be read: %s", root, error.strerror)
            unread.add(root)
            continue
        for name in names:
            if name in found:
                continue
            identity = _identity(os.path.join(root, name))
            if identity is None:
                continue
            try:
                check_name(name)
            except InvalidRequest:
                continue
            found[name] = root / name, identity
    return found, unread


def _identity(folder: str) -> Identity | None:
    """None if one of the files is missing. In strings: of thousands of folders, making paths would take most time."""
    identity: list[int] = []
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            status = os.stat(f"{folder}/{file}")
        except OSError:
            return None
        identity += status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return tuple(identity)

"""Loading one adapter: the way from a source to a READY or FAILED entry. Imports no torch.

Runs on the event loop; what touches files or the device runs in workers. What reading means is injected.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from loramux.errors import AdapterExists, AdapterUnavailable, Cancelled, Draining, InvalidAdapter, LoramuxError
from loramux.lora.chat_template import own_chat_template, template_digest
from loramux.lora.entry import AdapterEntry, LoadedAdapter, State
from loramux.lora.folder import AdapterFolder
from loramux.lora.limits import ReadLimits
from loramux.lora.registry import LOAD_FAILED, AdapterRegistry
from loramux.lora.roots import AdapterRoots
from loramux.lora.scan import identity_of
from loramux.lora.snapshot import folder_digest
from loramux.lora.workers import Job, Workers, retrieve

log = logging.getLogger(__name__)

Outcome = tuple[AdapterEntry, bool]  # and whether it was loaded already


class Loader:
    """Runs loads: of one name one after another, of different names side by side. See AdapterManager."""

    def __init__(
        self,
        registry: AdapterRegistry,
        roots: AdapterRoots,
        read: Callable[[AdapterFolder], LoadedAdapter],
        measure: Callable[[AdapterFolder], int],
        *,
        limits: ReadLimits,
        timeout: float,
        workers: int,
        place: Callable[[Any], LoadedAdapter] | None = None,
    ) -> None:
        """place: from the host's memory to the device, in a worker; None where they are the same memory."""
        self._registry = registry
        self._roots = roots
        self._read = read
        self._measure = measure
        self._place = place
        self._limits = limits
        self._timeout = timeout
        self._workers = Workers(workers, "loramux-adapters")
        self._jobs: dict[asyncio.Task[Any], Job] = {}
        self._loads: dict[str, asyncio.Task[Outcome]] = {}  # by name
        self._closed = False
        registry.tiers.measure = lambda entry: self._begin(entry, self._measure_entry)
        registry.tiers.fetch = self._fetch
        self.still: Callable[[AdapterEntry], Coroutine[Any, Any, None]] = _at_once  # until its files may be read

    async def load(
        self,
        name: str,
        source: str,
        *,
        replace: bool,
        pin: bool,
        digest: str | None = None,
        instead_of: AdapterEntry | None = None,
        managed: bool = False,
        quiet: bool = False,
    ) -> Outcome:
        """See AdapterManager.load. Who waits here may go away: the load goes on.

        digest      refuse any other
        instead_of  what the name must mean when the load begins; else it ends with Cancelled
        managed     see AdapterEntry
        quiet       who asks tells of a failure
        """
        while (running := self._loads.get(name)) is not None:
            await asyncio.wait({running})
        if instead_of is not None and self._registry.find(name) is not instead_of:
            raise Cancelled(f"adapter {name!r} was replaced or unloaded meanwhile")
        job = self._job()
        work = self._load(job, name, source, replace, pin, digest, managed)
        if not quiet:
            work = _told(work, name, source)
        # No name for the task here: a frame that holds its task holds its exception, which holds the frame.
        return await asyncio.shield(self._start(name, job, work, self._loads))

    async def validate(self, name: str, source: str) -> AdapterEntry:
        """Read and drop; the entry is in no registry."""
        job = self._job()
        entry, _ = await asyncio.shield(self._start(name, job, self._validate(job, name, source), {}))
        return entry

    async def holds(self, source: str, entry: AdapterEntry) -> bool:
        """Whether what lies at `source` now is what the entry was read from, its chat template included."""
        job = self._job()
        folder = await self._workers.run(job, self._roots.resolve, source)
        if await self._workers.run(job, folder_digest, folder, self._limits) != entry.digest:
            return False
        return await self._workers.run(job, template_digest, folder) == entry.template_as

    async def folder(self, entry: AdapterEntry) -> AdapterFolder:
        """Where its files are, if they may be read: what is registered has not been resolved yet."""
        return await self._workers.run(self._job(), self._roots.resolve, entry.source)

    async def chat_template(self, entry: AdapterEntry) -> str | None:
        """What lies beside its files, which have not been read yet; None if it cannot be: whoever loads it says so."""
        job = self._job()
        try:
            folder = await self._workers.run(job, self._roots.resolve, entry.source)
            return await self._workers.run(job, own_chat_template, folder)
        except LoramuxError:
            return None

    async def abort(self, name: str, error: LoramuxError) -> bool:
        """End the load of `name` that runs, if one does.

        On return that load has left its last trace. A later one may have begun; it has not reached the registry.
        """
        task = self._loads.get(name)
        if task is None:
            return False
        self._jobs[task].abort(error)
        await asyncio.wait({task})
        return True

    async def close(self, grace: float) -> None:
        """Abort everything; wait up to `grace` seconds for threads."""
        self._closed = True
        for job in self._jobs.values():
            job.abort(Draining("the server is shutting down"))
        if self._jobs:
            await asyncio.wait(set(self._jobs))
        await self._workers.close(grace)

    def _fetch(self, entry: AdapterEntry) -> None:
        if entry.hosted is not None and self._place is None:
            self._registry.fetched(entry.uid, entry.hosted)
        else:
            self._begin(entry, self._fetch_entry)

    def _begin(self, entry: AdapterEntry, work: Callable[[Job, AdapterEntry], Coroutine[Any, Any, None]]) -> None:
        """Work that requests wait for, not an operator: its outcome goes to the registry."""
        if self._closed:
            error = Draining("the server is shutting down and loads no more adapters")
            asyncio.get_running_loop().call_soon(self._registry.fetch_failed, entry.uid, error)
            return
        job = Job(self._timeout)
        task = asyncio.get_running_loop().create_task(work(job, entry))
        self._jobs[task] = job
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._jobs[task]
        retrieve(task)

    async def _measure_entry(self, job: Job, entry: AdapterEntry) -> None:
        try:
            if not entry.digest:
                await job.wait(self.still(entry))
            entry.read_as = await self._workers.run(job, identity_of, entry.source)
            folder = await self._workers.run(job, self._roots.resolve, entry.source)
            self._registry.tiers.measured(entry, await self._workers.run(job, self._measure, folder))
        except Exception as error:
            self._fetch_failed(entry, error)

    async def _fetch_entry(self, job: Job, entry: AdapterEntry) -> None:
        with self._reservation(job, entry.uid):
            try:
                loaded, seconds = await self._bring(job, entry)
                if entry.state is State.UNLOADED:
                    return  # nobody waits any more
                self._registry.fetched(entry.uid, loaded, load_seconds=seconds)
            except Exception as error:
                self._fetch_failed(entry, error)

    def _fetch_failed(self, entry: AdapterEntry, error: Exception) -> None:
        known = _as_known(entry.name, error)
        _tell(entry.name, entry.source, known)
        self._registry.fetch_failed(entry.uid, known)

    async def _bring(self, job: Job, entry: AdapterEntry) -> tuple[LoadedAdapter, float | None]:
        """From the host's memory or else from its files, and the seconds that reading these took."""
        if entry.hosted is not None and self._place is not None:
            return await self._workers.run(job, self._place, entry.hosted), None
        if not entry.digest:
            await job.wait(self.still(entry))
        started = asyncio.get_running_loop().time()
        entry.read_as = await self._workers.run(job, identity_of, entry.source)
        folder = await self._workers.run(job, self._roots.resolve, entry.source)
        entry.template_as = await self._workers.run(job, template_digest, folder)
        loaded = await self._workers.run(job, self._read, folder)
        return loaded, asyncio.get_running_loop().time() - started

    def _job(self) -> Job:
        if self._closed:
            raise Draining("the server is shutting down and loads no more adapters")
        return Job(self._timeout)

    def _start(
        self, name: str, job: Job, work: Coroutine[Any, Any, Outcome], by_name: dict[str, asyncio.Task[Outcome]]
    ) -> asyncio.Task[Outcome]:
        task = asyncio.get_running_loop().create_task(work)
        self._jobs[task] = job
        by_name[name] = task

        def ended(task: asyncio.Task[Outcome]) -> None:
            del self._jobs[task]
            del by_name[name]
            retrieve(task)  # the caller may be gone

        task.add_done_callback(ended)
        return task

    async def _load(
        self, job: Job, name: str, source: str, replace: bool, pin: bool, wanted: str | None, managed: bool
    ) -> Outcome:
        started = asyncio.get_running_loop().time()
        folder = await self._workers.run(job, self._roots.resolve, source)
        if wanted is not None:
            found = await self._workers.run(job, folder_digest, folder, self._limits)
            if found != wanted:
                raise InvalidAdapter(
                    str(folder), f"holds {found}, not {wanted}, which was asked for", reason="ADAPTER_FILES_CHANGED"
                )
        current = self._registry.find(name)
        if current is not None and current.state is State.READY:
            # Hashed before anything is placed: what is loaded already must not need memory twice.
            digest = await self._workers.run(job, folder_digest, folder, self._limits)
            template = await self._workers.run(job, template_digest, folder)
            if digest == current.digest and (template == current.template_as or not replace):
                return (self._registry.pin(name, True) if pin else current), True
            if not replace:
                raise _name_taken(current, digest, folder)
            pin = pin or current.pinned
        entry = self._registry.begin(name, str(folder), pinned=pin, managed=managed, fixed=wanted is not None)
        with self._reservation(job, entry.uid):
            try:
                entry.read_as = await self._workers.run(job, identity_of, entry.source)
                entry.template_as = await self._workers.run(job, template_digest, folder)
                loaded = await self._read_within_budget(job, entry.uid, name, folder)
                seconds = asyncio.get_running_loop().time() - started
                return self._registry.ready(entry.uid, loaded, load_seconds=seconds), False
            except BaseException as error:
                stopped = Cancelled("the server stopped while it was loading")
                self._registry.fail(entry.uid, error if isinstance(error, LoramuxError) else stopped)
                raise

    async def _validate(self, job: Job, name: str, source: str) -> Outcome:
        folder = await self._workers.run(job, self._roots.resolve, source)
        owner = f"validation {uuid.uuid4().hex}"
        with self._reservation(job, owner):
            loaded = await self._read_within_budget(job, owner, name, folder)
            entry = AdapterEntry(name, "", str(folder), False, loaded.digest, State.UNLOADED)
            entry.nbytes, entry.max_rank = loaded.nbytes, loaded.max_rank
            entry.target_modules, entry.site_count = tuple(loaded.target_modules), loaded.site_count
            entry.warnings = tuple(loaded.warnings)
            return entry, False

    async def _read_within_budget(self, job: Job, owner: str, name: str, folder: AdapterFolder) -> LoadedAdapter:
        try:
            nbytes = await self._workers.run(job, self._measure, folder)
            self._registry.tiers.room(owner, nbytes, what=f"adapter {name!r}")
            return await self._workers.run(job, self._read, folder)
        except Exception as error:
            raise _as_known(name, error) from None

    @contextmanager
    def _reservation(self, job: Job, owner: str) -> Iterator[None]:
        """Give back what `owner` reserved; if a worker could not be stopped, only once it has ended."""
        try:
            yield
        finally:
            job.when_idle(lambda: self._unreserve(owner))

    def _unreserve(self, owner: str) -> None:
        self._registry.budget.unreserve(owner)
        self._registry.tiers.advance()


def _name_taken(current: AdapterEntry, digest: str, folder: AdapterFolder) -> AdapterExists:
    return AdapterExists(
        f"adapter {current.name!r} is loaded with other content ({current.digest} from {current.source}, not "
        f"{digest} from {folder}); ask with replace to put this in its place, or use another name",
        metadata={"adapter": current.name, "loaded": current.digest, "asked": digest},
    )


async def _at_once(entry: AdapterEntry) -> None:
    """Nobody writes."""


async def _told(work: Coroutine[Any, Any, Outcome], name: str, source: str) -> Outcome:
    try:
        return await work
    except LoramuxError as error:
        _tell(name, source, error)
        raise


def _tell(name: str, source: str, error: LoramuxError) -> None:
    """One line for each load that failed; none for what an operator stopped or must ask for otherwise."""
    if not isinstance(error, AdapterExists | Cancelled | Draining) and error.reason != LOAD_FAILED:
        log.warning("adapter %r failed to load from %r: %s", name, source, error.message)


def _as_known(name: str, error: Exception) -> LoramuxError:
    """`error` itself if it is one of ours. Others are for the log, with one sentence for the operator."""
    if isinstance(error, LoramuxError):
        return error
    log.error("loading adapter %r failed", name, exc_info=error)
    return AdapterUnavailable(f"adapter {name!r} failed to load: {type(error).__name__}: {error}", reason=LOAD_FAILED)

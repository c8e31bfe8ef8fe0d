"""The standard health service, one for each port, over one switch for the whole server.

A watcher is written to outside of any lock: one that does not read holds up nobody, least of all the drain. Anyone may
watch, without a key; so the watchers of a port are bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux.errors import UnknownService
from loramux.rpc.boundary import Context
from loramux.rpc.watchers import Watchers

Status = health_pb2.HealthCheckResponse


class Health:
    """The switch: serving while accepting and while `engine_healthy()`. Event loop's thread, except `serving`.

    An engine fault shows in each Check at once, and to watchers at the next `refresh`.
    """

    def __init__(self, engine_healthy: Callable[[], bool]) -> None:
        self.closed = False
        self.changed = asyncio.Event()  # a new one after each change
        self._engine_healthy = engine_healthy
        self._accepting = False

    @property
    def serving(self) -> bool:
        """Whether requests are welcome. Any thread."""
        return self._accepting and self._engine_healthy()

    def accept(self, accepting: bool) -> None:
        """Open or close the server for new work."""
        self._accepting = accepting
        self.refresh()

    def refresh(self) -> None:
        """Let watchers look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def close(self) -> None:
        """End the watchers' streams, so that stopping the server does not wait for them."""
        self.closed = True
        self.refresh()


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The health of a port, which knows itself ("") and the service that it serves, and no other."""

    def __init__(self, health: Health, service: str) -> None:
        self._health = health
        self._services = ("", service)
        self._watchers = Watchers()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Status:
        if request.service not in self._services:
            raise UnknownService(f"this port does not serve {request.service[:128]!r}; it serves {self._services[1]}")
        return Status(status=self._status(request.service))

    async def List(self, request: Any, context: Context) -> Any:
        now = {service: Status(status=self._status(service)) for service in self._services}
        listed: Any = health_pb2  # its type stubs are older than this method
        return listed.HealthListResponse(statuses=now)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        with self._watchers.one():
            await self._watch(request.service, context)

    async def _watch(self, service: str, context: Context) -> None:
        last = None
        while not self._health.closed:
            changed = self._health.changed
            status = self._status(service)
            if status != last:
                await context.write(Status(status=status))
                last = status
            else:
                await changed.wait()

    def _status(self, service: str) -> Any:
        """A watcher of an unknown service waits for it to appear, as the protocol has it."""
        if service not in self._services:
            return Status.SERVICE_UNKNOWN
        return Status.SERVING if self._health.serving else Status.NOT_SERVING

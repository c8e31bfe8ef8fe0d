"""The standard health service over one switch for the whole server.

A watcher is written to outside of any lock: one that does not read holds up nobody, least of all the drain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux.rpc.boundary import Context
from loramux.rpc.watchers import Watchers

Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """SERVING while accepting and while `engine_healthy()`. Event loop's thread, except `serving`.

    `services` are known beside "" (the whole server); all have the same status. An engine fault shows in each
    Check at once, and to watchers at the next `refresh`.
    """

    def __init__(self, services: Iterable[str], engine_healthy: Callable[[], bool]) -> None:
        self._services = {"", *services}
        self._engine_healthy = engine_healthy
        self._accepting = False
        self._closed = False
        self._changed = asyncio.Event()
        self._watchers = Watchers()

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
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """End the watchers' streams, so that stopping the server does not wait for them."""
        self._closed = True
        self.refresh()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Status:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return Status(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        with self._watchers.one():
            last = None
            while not self._closed:
                changed = self._changed
                status = self._status(request.service)
                if status != last:
                    await context.write(Status(status=status))
                    last = status
                else:
                    await changed.wait()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return Status.SERVICE_UNKNOWN
        return Status.SERVING if self.serving else Status.NOT_SERVING

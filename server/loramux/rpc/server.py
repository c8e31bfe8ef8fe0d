"""Both gRPC servers, health, reflection and the metrics port: built, started and drained together.

Signals belong to the command line: it calls `drain`. The engine is started before this server and stopped after it
by whoever made it. Knows nothing of models, files and sockets' options.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from dataclasses import dataclass
from functools import partial

from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux.config import Settings
from loramux.engine.client import EngineClient
from loramux.errors import Draining, LoramuxError, StartupError
from loramux.http.metrics_server import MetricsServer
from loramux.lora.entry import AdapterEntry
from loramux.lora.manager import AdapterManager
from loramux.metrics import Metrics
from loramux.rpc import sizes
from loramux.rpc.adapters import AdapterServicer
from loramux.rpc.flight import Admission
from loramux.rpc.generation import GenerationServicer
from loramux.rpc.health import Health, HealthServicer
from loramux.rpc.listening import bind, make_server
from loramux.rpc.merged import MergedOnly
from loramux.rpc.ports import Merger, ModelInfo, Tokenizer
from loramux.rpc.reflection import add_reflection
from loramux.rpc.telemetry import RequestRecord, Telemetry
from loramux.rpc.tokenizing import Tokenizing
from loramux.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from loramux.values import StartAdapter

log = logging.getLogger(__name__)

GENERATION: str = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
ADAPTERS: str = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name
HEALTH: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_GENERATING = frozenset(f"/{GENERATION}/{method}" for method in ("Generate", "GenerateStream"))
_LAST_WORDS_SECONDS = 2.0  # for RPCs to send what they have, once the engine has drained
_HEALTH_SECONDS = 1.0  # how late a health watcher may hear of an engine fault


class Phase(enum.Enum):
    """Where the server is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Parts:
    """What is served. The engine runs already; its `on_finish` releases leases in the manager's registry."""

    engine: EngineClient
    adapters: AdapterManager
    tokenizer: Tokenizer
    model: ModelInfo
    merger: Merger


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where clients connect: "host:port" or "unix:path". `metrics` is empty if not served."""

    public: str
    admin: str
    metrics: str = ""


class Server:
    """`start`, then `wait`; somebody calls `drain`. Made and used on one event loop, once."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        self.metrics = Metrics(settings.model)
        self._settings = settings
        self._parts = parts
        self._phase = Phase.STARTING
        self._stopped = asyncio.Event()
        self._drain: asyncio.Task[int] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._metrics_server: MetricsServer | None = None
        self._telemetry = Telemetry(self.metrics, parts.engine, parts.adapters.registry)
        self._tokenizing = Tokenizing(parts.tokenizer, parts.engine.limits, max_waiting=settings.max_queue)
        self._health = Health(lambda: parts.engine.healthy)
        self._unlisten = parts.adapters.registry.listen(self._adapter_changed)
        parts.adapters.registry.tiers.turn = parts.engine.wake
        api_key, admin_key = settings.api_key, settings.admin_key
        bounds = sizes.bounds(parts.engine.limits)
        make = partial(make_server, settings, bounds=bounds, on_error=self._count, on_refusal=self._refused)
        self._public = make(scope="public", key=api_key, other_key=admin_key)
        self._admin = make(scope="admin", key=admin_key, other_key=api_key)
        self._add_services()

    def _add_services(self) -> None:
        settings, parts = self._settings, self._parts
        merged = MergedOnly(parts.model.merged_adapter)
        admission = Admission(
            parts.engine,
            parts.adapters.registry,
            self._tokenizing,
            self.metrics,
            self._check_open,
            merged,
            parts.adapters.chat_template if settings.adapter_chat_templates else None,
        )
        generation = GenerationServicer(parts.engine, admission, parts.model, send_timeout=settings.send_timeout)
        adapters = AdapterServicer(
            parts.adapters, parts.engine, parts.merger, merged, send_timeout=settings.send_timeout
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, self._public)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._admin)
        for server, service in ((self._public, GENERATION), (self._admin, ADAPTERS)):
            health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self._health, service), server)
            add_reflection(server, (service, HEALTH))

    async def start(self) -> Addresses:
        """Listen, load the adapters named in the settings, then welcome requests.

        Probes are answered from the first moment; requests get UNAVAILABLE until all is there. Raises
        StartupError; nothing listens then.
        """
        try:
            addresses = await self._listen()
            await self._start_adapters()
            await asyncio.gather(*(self._load(adapter) for adapter in self._settings.start_adapters))
        except BaseException:
            await self._close()
            raise
        self._phase = Phase.SERVING
        self._health.accept(True)
        self._watch = asyncio.create_task(self._watch_engine())
        return addresses

    async def _listen(self) -> Addresses:
        s = self._settings
        public = bind(self._public, s.host, s.port, s, flag="--port")
        admin = bind(self._admin, s.admin_host, s.admin_port, s, flag="--admin-port")
        metrics = ""
        if s.metrics_port:
            self._metrics_server = MetricsServer(
                s.metrics_host,
                s.metrics_port,
                render=self.metrics.render,
                serving=lambda: self._health.serving,
            )
            metrics = f"{s.metrics_host}:{self._metrics_server.port}"
            self._metrics_server.start()
        await self._public.start()
        await self._admin.start()
        return Addresses(public, admin, metrics)

    async def _start_adapters(self) -> None:
        try:
            await self._parts.adapters.start()
        except LoramuxError as error:
            raise StartupError(error.message) from error

    async def _load(self, adapter: StartAdapter) -> None:
        try:
            await self._parts.adapters.load(adapter.name, adapter.source)
        except LoramuxError as error:
            raise StartupError(f"--adapter {adapter.name}: {error.message}") from error

    async def drain(self) -> int:
        """Refuse new requests, let the running ones finish, then stop. Returns how many had to be cancelled.

        Calling it again waits for the first call's end.
        """
        if self._drain is None:
            self._phase = Phase.DRAINING
            self._health.accept(False)
            self._drain = asyncio.create_task(self._drain_and_close())
        return await asyncio.shield(self._drain)

    async def _drain_and_close(self) -> int:
        cancelled = await self._parts.engine.drain(self._settings.drain_timeout)
        await self._close()
        return cancelled

    async def _close(self) -> None:
        self._health.close()
        if self._watch is not None:
            self._watch.cancel()
        await self._parts.adapters.close()
        await self._parts.merger.close()
        await asyncio.gather(self._public.stop(_LAST_WORDS_SECONDS), self._admin.stop(_LAST_WORDS_SECONDS))
        self._unlisten()
        self._tokenizing.close()
        self._telemetry.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)
        self._stopped.set()

    async def wait(self) -> None:
        """Until a drain has ended."""
        await self._stopped.wait()

    def _check_open(self) -> None:
        """Raise Draining unless requests are welcome."""
        if self._phase is not Phase.SERVING:
            raise Draining(
                f"the server is {self._phase.value} and takes no requests now",
                metadata={"phase": self._phase.value},
            )

    def _count(self, error: LoramuxError) -> None:
        self.metrics.failed(error.reason)

    def _refused(self, method: str, request_id: str, error: LoramuxError) -> None:
        self._count(error)
        if method in _GENERATING:  # it never came to its admission, which counts the others
            RequestRecord(self.metrics, request_id).end(error)

    def _adapter_changed(self, _entry: AdapterEntry) -> None:
        self._parts.engine.wake()  # requests may wait for this load

    async def _watch_engine(self) -> None:
        healthy = True
        while True:
            await asyncio.sleep(_HEALTH_SECONDS)
            if self._parts.engine.healthy is not healthy:
                healthy = not healthy
                log.log(logging.INFO if healthy else logging.ERROR, "engine healthy: %s", healthy)
                self._health.refresh()

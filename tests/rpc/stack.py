"""A whole server on loopback: real gRPC, real registry, manager and engine; only the model has no arithmetic.

`ScriptedEngine` stands in for the engine where a test needs one that misbehaves or never ends.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
from loramux.client import AsyncAdminClient, AsyncClient
from loramux.config import Settings
from loramux.engine.door import Limits
from loramux.engine.loop import AsyncEngine
from loramux.engine.request import Delta, Event, FinishReason, Request, SequenceFinished, Usage
from loramux.engine.settings import EngineSettings
from loramux.engine.stats import EngineStats
from loramux.errors import InvalidAdapter, InvalidRequest, LoramuxError
from loramux.lora.folder import AdapterFolder
from loramux.lora.limits import ReadLimits
from loramux.lora.manager import AdapterManager
from loramux.lora.registry import AdapterRegistry
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE, AdapterRoots
from loramux.lora.snapshot import folder_digest
from loramux.merge_process import MergeProcess
from loramux.rpc.ports import ModelInfo
from loramux.rpc.server import Addresses, Parts, Server
from loramux.v1 import adapters_pb2_grpc, generation_pb2_grpc

from tests.engine.fakes import VOCAB, FakeModel, byte_tokenizer
from tests.patience import PATIENCE

MODEL = ModelInfo("fake", "FakeForCausalLM", 1000, 4.127, 516, "cpu", 256, ("q_proj", "v_proj"))


class ByteTokens:
    """One token a byte."""

    longest_token = 4

    def encode(self, text: str, *how: Any) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Any, *how: Any) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise InvalidRequest("chat.messages", "the template wants a user first")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


@dataclass
class ScriptedEngine:
    """Keeps EngineClient's promises about `on_finish`; what it delivers is the test's `script`."""

    script: Callable[[Request], AsyncIterator[Event]]
    on_finish: Callable[[Request], None] = lambda _: None
    healthy: bool = True
    limits: Limits = field(default_factory=lambda: Limits(vocab_size=VOCAB, max_context=4096))
    live: set[str] = field(default_factory=set)
    seen: list[Request] = field(default_factory=list)
    drained: bool = False

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        self.live.add(request.request_id)
        self.seen.append(request)
        try:
            async for event in self.script(request):
                yield event
        finally:
            self.live.discard(request.request_id)
            self.on_finish(request)

    def abort(self, request_id: str, error: LoramuxError) -> None:
        raise NotImplementedError

    def wake(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.live))

    async def drain(self, timeout: float) -> int:  # noqa: ASYNC109 - as EngineClient has it
        self.drained = True
        return 0


def finished(index: int = 0, *, last: bool = True) -> SequenceFinished:
    """A good end."""
    return SequenceFinished(index, FinishReason.STOP, usage=Usage(1, 1, 0), last=last)


async def two_words(request: Request) -> AsyncIterator[Event]:
    """A short, good answer."""
    yield Delta(0, "hello ", [1])
    yield Delta(0, "world", [2])
    yield finished()


async def endless(request: Request) -> AsyncIterator[Event]:
    """Never ends, and never says anything."""
    yield Delta(0, "x", [1])
    await asyncio.Event().wait()


def write_adapter(root: Path, name: str, content: bytes = b"weights") -> Path:
    """A folder that the fake reader takes; content that begins with b"bad" it refuses, with b"dora" cannot be mixed."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA"}))
    (folder / WEIGHTS_FILE).write_bytes(content)
    return folder


class Loaded(SimpleNamespace):
    """A LoadedAdapter without tensors; unlike its base it can be referred to weakly."""

    @property
    def on_host(self) -> Loaded:
        return self


def read_adapter(folder: AdapterFolder) -> Any:
    """What lora.peft_files would do, without tensors."""
    content = (folder.path / WEIGHTS_FILE).read_bytes()
    if content.startswith(b"bad"):
        raise InvalidAdapter("lora_A", "holds NaN")
    digest = folder_digest(folder, ReadLimits())
    return Loaded(
        weights={0: digest},
        nbytes=len(content),
        digest=digest,
        max_rank=8,
        target_modules=("q_proj",),
        site_count=2,
        warnings=(),
        chat_template=None,
        mixable=not content.startswith(b"dora"),
    )


@dataclass
class Running:
    """A server that runs, with a client on each port."""

    server: Server
    addresses: Addresses
    engine: Any
    registry: AdapterRegistry
    manager: AdapterManager
    roots: Path
    client: AsyncClient
    admin: AsyncAdminClient

    def at_baseline(self) -> bool:
        """No lease is out and nothing runs or waits."""
        stats = self.engine.stats()
        leases = sum(len(entry.leases) for entry in self.registry.entries())
        return (stats.running, stats.waiting, leases) == (0, 0, 0)

    async def until(self, **counts: int) -> None:
        """Until the engine's stats have these values; fails if they never do."""
        async with asyncio.timeout(PATIENCE):
            while any(getattr(self.engine.stats(), name) != value for name, value in counts.items()):
                await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """Until everything is at its baseline again; fails if they never do."""
        async with asyncio.timeout(PATIENCE):
            while not self.at_baseline():
                await asyncio.sleep(0.01)
        self.registry.check()


def generation_stub(channel: grpc.aio.Channel) -> Any:
    """The generated client, for what our own would not send."""
    return generation_pb2_grpc.GenerationServiceStub(channel)


def adapter_stub(channel: grpc.aio.Channel) -> Any:
    """The same of the admin port."""
    return adapters_pb2_grpc.AdapterServiceStub(channel)


@asynccontextmanager
async def running(
    root: Path,
    *,
    adapters: tuple[str, ...] = (),
    script: Callable[[Request], AsyncIterator[Event]] | None = None,
    engine_settings: EngineSettings | None = None,
    model: FakeModel | None = None,
    api_key: str | None = None,
    admin_key: str | None = None,
    load: bool = True,
    budget: int | None = None,
    host_budget: int = 0,
    scan_interval: float | None = None,
    server_type: type[Server] = Server,
    read: Callable[[AdapterFolder], Any] = read_adapter,
    tokens: ByteTokens | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """Serve the adapters (folders are made) on free ports. `script`: with a ScriptedEngine."""
    for name in adapters:
        if not (root / name).exists():
            write_adapter(root, name, f"weights of {name}".encode())
    registry = AdapterRegistry(device_budget=budget, host_budget=host_budget)

    def release(request: Request) -> None:
        for use in request.adapters:
            registry.release(use.handle.uid, request.request_id)

    engine: Any
    async with AsyncExitStack() as after:
        manager = AdapterManager(
            registry, AdapterRoots([root]), read, load_timeout=PATIENCE, scan_interval=scan_interval
        )
        if script is not None:
            engine = ScriptedEngine(script, on_finish=release)
        else:
            engine = AsyncEngine(
                model or FakeModel(),
                byte_tokenizer(),
                engine_settings or EngineSettings(block_size=4),
                on_finish=release,
            )
            await engine.start()
            after.push_async_callback(engine.stop)
        values = {"port": 0, "admin_port": 0, "metrics_port": 0, "drain_timeout": 5.0} | settings
        server = server_type(
            Settings(api_key=api_key, admin_key=admin_key, **values),
            Parts(engine, manager, tokens or ByteTokens(), MODEL, MergeProcess("fake", None)),
        )
        addresses = await server.start()
        # A request that never ends must not hide the assertion that told of it.
        after.push_async_callback(lambda: asyncio.wait_for(server.drain(), PATIENCE))
        if load:
            for name in adapters:
                await manager.load(name)
        client = await after.enter_async_context(AsyncClient(addresses.public, api_key=api_key, timeout=PATIENCE))
        admin = await after.enter_async_context(AsyncAdminClient(addresses.admin, api_key=admin_key, timeout=PATIENCE))
        yield Running(server, addresses, engine, registry, manager, root, client, admin)

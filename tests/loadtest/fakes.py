"""A server whose timing and faults the test chooses: both services and a metrics page, in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from loramux.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc

VOCAB = 1000


@dataclass
class Behaviour:
    """What the fake does. Times in seconds; `delta_sizes` are cycled through until the answer is complete."""

    first_token: float = 0.0
    between: float = 0.0
    delta_sizes: tuple[int, ...] = (1,)
    fail_adapter: str = ""
    short_by: int = 0
    answer_from: str = ""
    fail_load_at: int = -1
    forget_to_free: bool = False
    resident: int = 100 << 20
    grow_per_load: int = 0


class FakeServer(generation_pb2_grpc.GenerationServiceServicer, adapters_pb2_grpc.AdapterServiceServicer):
    """Serves until its context ends. `used` counts requests by adapter; `peak` is the most at once."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.loaded: dict[str, str] = {}
        self.leases: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self.requests: list[generation_pb2.GenerateRequest] = []
        self.cancelled = 0
        self.loads = 0
        self.unloads = 0
        self.unloaded_in_use = 0
        self.running = 0
        self.peak = 0
        self.target = ""
        self.metrics = ""

    async def GetModel(self, request: Any, context: Any) -> generation_pb2.GetModelResponse:
        return generation_pb2.GetModelResponse(model="fake", vocab_size=VOCAB, max_context=4096)

    async def GenerateStream(
        self, request: generation_pb2.GenerateStreamRequest, context: Any
    ) -> AsyncIterator[generation_pb2.GenerateStreamResponse]:
        asked, how = request.request, self.behaviour
        name = asked.adapter
        if name and (name not in self.loaded or name == how.fail_adapter):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"no room for {name}")
        uid = self.loaded.get(name, "")
        self.requests.append(asked)
        self.used[name] += 1
        self.running += 1
        self.peak = max(self.peak, self.running)
        self.leases[uid] += 1
        try:
            resolved = [generation_pb2.ResolvedAdapter(name=name, uid=how.answer_from or uid)] if uid else []
            started = generation_pb2.StreamStarted(prompt_tokens=len(asked.token_ids.ids), adapters=resolved)
            yield generation_pb2.GenerateStreamResponse(started=started)
            left = asked.sampling.max_new_tokens - how.short_by
            turn = 0
            while left > 0:
                await asyncio.sleep(how.between if turn else how.first_token)
                size = min(left, how.delta_sizes[turn % len(how.delta_sizes)])
                delta = generation_pb2.StreamDelta(text="x" * size, token_ids=range(size))
                yield generation_pb2.GenerateStreamResponse(delta=delta)
                left -= size
                turn += 1
            finished = generation_pb2.StreamFinished(finish_reason=generation_pb2.FINISH_REASON_LENGTH)
            yield generation_pb2.GenerateStreamResponse(finished=finished)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            self.leases[uid] -= 1

    async def LoadAdapter(self, request: Any, context: Any) -> adapters_pb2.LoadAdapterResponse:
        if self.loads == self.behaviour.fail_load_at:
            self.loads += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "a bad adapter")
        self.loads += 1
        self.behaviour.resident += self.behaviour.grow_per_load
        self.loaded[request.name] = f"uid-{self.loads}"
        return adapters_pb2.LoadAdapterResponse(adapter=self._adapter(request.name))

    async def UnloadAdapter(self, request: Any, context: Any) -> adapters_pb2.UnloadAdapterResponse:
        uid = self.loaded.pop(request.name)
        self.unloads += 1
        self.unloaded_in_use += self.leases[uid] > 0
        while self.leases[uid]:
            await asyncio.sleep(0.002)
        if self.behaviour.forget_to_free:
            self.loaded.setdefault("forgotten", uid)
        return adapters_pb2.UnloadAdapterResponse(freed_bytes=10)

    async def ListAdapters(self, request: Any, context: Any) -> adapters_pb2.ListAdaptersResponse:
        adapters = [self._adapter(name) for name in sorted(self.loaded)]
        return adapters_pb2.ListAdaptersResponse(adapters=adapters, device_bytes=10 * len(adapters))

    def _adapter(self, name: str) -> adapters_pb2.Adapter:
        uid = self.loaded[name]
        return adapters_pb2.Adapter(name=name, uid=uid, state=adapters_pb2.ADAPTER_STATE_READY, leases=self.leases[uid])

    async def page(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one HTTP request with the metrics page."""
        await reader.readuntil(b"\r\n\r\n")
        values = {
            'vllm:num_requests_running{model_name="fake"}': self.running,
            'vllm:num_requests_waiting{model_name="fake"}': 0,
            'vllm:kv_cache_usage_perc{model_name="fake"}': self.running / 100,
            "loramux_adapter_leases": self.leases.total() - self.leases[""],
            "loramux_adapter_bytes": 10 * len(self.loaded),
            'loramux_adapter_lookups_total{tier="device"}': self.used.total() - self.used[""],
            'loramux_adapter_lookups_total{tier="disk"}': self.loads,
            "loramux_adapter_evictions_total": self.unloads,
            "loramux_adapter_load_seconds_count": self.loads,
            "loramux_adapter_load_seconds_sum": 0.25 * self.loads,
            "process_resident_memory_bytes": self.behaviour.resident,
        }
        body = "".join(f"{name} {value}\n" for name, value in values.items()).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@dataclass
class Running:
    """A fake and where it listens (both services on one port)."""

    fake: FakeServer
    address: str
    metrics: str
    stack: list[Any] = field(default_factory=list)


@contextlib.asynccontextmanager
async def serving(behaviour: Behaviour) -> AsyncIterator[Running]:
    """Run a fake on loopback."""
    fake = FakeServer(behaviour)
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(fake, server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    web = await asyncio.start_server(fake.page, "127.0.0.1", 0)
    metrics = f"http://127.0.0.1:{web.sockets[0].getsockname()[1]}/metrics"
    try:
        yield Running(fake, f"127.0.0.1:{port}", metrics)
    finally:
        web.close()
        await server.stop(None)

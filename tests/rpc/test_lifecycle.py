"""Start, health, reflection, drain: what probes and load balancers see."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loramux.answers import Finished
from loramux.client import AsyncAdminClient, AsyncClient
from loramux.config import Settings
from loramux.engine.request import Delta, Event, Request
from loramux.errors import Cancelled, Draining, StartupError, Unreachable
from loramux.rpc import health as health_module
from loramux.rpc import status
from loramux.rpc.server import Server
from loramux.rpc.watchers import MOST, Watchers
from loramux.values import StartAdapter

from tests.patience import PATIENCE
from tests.rpc.stack import finished, running, two_words, write_adapter

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("loramux.v1.GenerationService", "loramux.v1.AdapterService")


def reflection_stub(channel: Any) -> Any:
    return reflection_pb2_grpc.ServerReflectionStub(channel)


def health_stub(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


async def test_a_port_knows_the_health_of_what_it_serves(tmp_path: Path) -> None:
    """Each port told of both services, and so of one that nobody reaches there."""
    unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    async with running(tmp_path) as r:
        for address, own, other in ((r.addresses.public, *SERVICES), (r.addresses.admin, *reversed(SERVICES))):
            async with grpc.aio.insecure_channel(address) as channel:
                health = health_stub(channel)
                for service in ("", own):
                    assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
                    watch = health.Watch(health_pb2.HealthCheckRequest(service=service))
                    assert (await anext(aiter(watch))).status == SERVING
                listed = (await health.List(health_pb2.HealthListRequest())).statuses
                assert {name: each.status for name, each in listed.items()} == {"": SERVING, own: SERVING}
                for service in ("nobody", other, "x" * 100_000):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await health.Check(health_pb2.HealthCheckRequest(service=service))
                    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
                    watch = health.Watch(health_pb2.HealthCheckRequest(service=service))
                    assert (await anext(aiter(watch))).status == unknown


async def test_watchers_of_health_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may watch, without a key, for as long as they like."""
    monkeypatch.setattr(health_module, "Watchers", partial(Watchers, 3))
    async with running(tmp_path, api_key="right-key") as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        stub = health_stub(channel)
        watchers = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for watcher in watchers:
            assert (await anext(aiter(watcher))).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest())))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
        watchers[0].cancel()
        async with asyncio.timeout(PATIENCE):
            while True:  # until its place is free
                with suppress(grpc.aio.AioRpcError):
                    assert (await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest())))).status == SERVING
                    break


async def test_an_engine_fault_flips_health(tmp_path: Path) -> None:
    async with running(tmp_path, script=two_words) as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        health = health_stub(channel)
        watch = aiter(health.Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING
        r.engine.healthy = False
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        async with asyncio.timeout(PATIENCE):
            assert (await anext(watch)).status == NOT_SERVING
        r.engine.healthy = True
        async with asyncio.timeout(PATIENCE):
            assert (await anext(watch)).status == SERVING


async def test_requests_are_refused_until_the_start_adapters_are_there(tmp_path: Path) -> None:
    """A server that answered before its adapters were loaded said NOT_FOUND of names that were about to exist."""
    write_adapter(tmp_path, "a")
    seen: list[object] = []

    class Waiting(Server):
        async def _load(self, adapter: StartAdapter) -> None:
            await super()._load(adapter)
            async with grpc.aio.insecure_channel(self._settings.host) as channel, AsyncClient(self._settings.host) as c:
                seen.append((await health_stub(channel).Check(health_pb2.HealthCheckRequest())).status)
                try:
                    await c.generate("hi", adapter="a")
                except Draining as error:
                    seen.append(type(error).__name__)

    socket = f"unix:{tmp_path}/p.sock"
    async with running(tmp_path, host=socket, adapter=(StartAdapter("a"),), server_type=Waiting) as r:
        assert seen == [NOT_SERVING, "Draining"]
        assert (await r.client.generate("hi", adapter="a", max_new_tokens=2)).adapters[0].name == "a"


async def test_a_start_adapter_that_fails_stops_the_start(tmp_path: Path) -> None:
    write_adapter(tmp_path, "broken", b"bad")
    with pytest.raises(StartupError, match=r"--adapter broken: .*holds NaN"):
        async with running(tmp_path, adapter=(StartAdapter("broken"),)):
            pass


async def test_a_port_that_is_taken_stops_the_start(tmp_path: Path) -> None:
    """With SO_REUSEPORT, gRPC's default, two servers shared one port in silence, and each got half of the calls."""
    async with running(tmp_path) as r:
        taken = int(r.addresses.public.rsplit(":", 1)[1])
        with pytest.raises(StartupError, match="--port: cannot listen on"):
            async with running(tmp_path, port=taken):
                pass


def test_admin_beyond_loopback_needs_a_key() -> None:
    with pytest.raises(StartupError, match="LORAMUX_ADMIN_KEY"):
        Settings(admin_host="0.0.0.0")
    assert Settings(admin_host="0.0.0.0", admin_key="long-enough").admin_host == "0.0.0.0"
    for local in ("127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3", "unix:/run/loramux.sock"):
        assert Settings(admin_host=local).admin_host == local


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_and_describes_the_services(tmp_path: Path, version: str) -> None:
    """Newer clients ask for v1 only: the other name was all that grpcio-reflection registers."""
    method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    ask = reflection_pb2.ServerReflectionRequest
    async with running(tmp_path) as r:
        for address, service in ((r.addresses.public, SERVICES[0]), (r.addresses.admin, SERVICES[1])):
            async with grpc.aio.insecure_channel(address) as channel:
                open_call: Any = channel.stream_stream
                call = open_call(method, ask.SerializeToString, reflection_pb2.ServerReflectionResponse.FromString)
                listed = await anext(aiter(call(iter([ask(list_services="")]))))
                names = {item.name for item in listed.list_services_response.service}
                reflections = {f"grpc.reflection.{v}.ServerReflection" for v in ("v1", "v1alpha")}
                assert names == {service, "grpc.health.v1.Health"} | reflections
                symbols = [ask(file_containing_symbol=name) for name in sorted(names)]
                answers = [answer async for answer in call(iter(symbols))]
                assert len(answers) == len(names)
                for name, answer in zip(sorted(names), answers, strict=True):
                    raw = answer.file_descriptor_response.file_descriptor_proto
                    files = [descriptor_pb2.FileDescriptorProto.FromString(file) for file in raw]
                    pool = descriptor_pool.DescriptorPool()  # with its imports it is whole: a client can build it
                    for file in reversed(files):
                        pool.Add(file)
                    assert pool.FindServiceByName(name).methods


async def test_reflection_refuses_by_the_one_table(tmp_path: Path) -> None:
    """It answered UNKNOWN with the exception's text, and without end to whoever opened streams."""
    method = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    async with (
        running(tmp_path, max_message_bytes=1000) as r,
        grpc.aio.insecure_channel(r.addresses.public) as channel,
    ):
        for raw, reason in ((b"\xff\xff", "MALFORMED_MESSAGE"), (b"\x0a\xdc\x0b" + b"x" * 1500, "MESSAGE_TOO_LARGE")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(channel.stream_stream(method)(iter([raw]))))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (
                status.to_error(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    caught.value.details() or "",
                    dict(caught.value.trailing_metadata())[status.DETAILS_KEY],
                ).reason
                == reason
            )
        streams = [channel.stream_stream(method)() for _ in range(MOST)]
        for stream in streams:
            await stream.write(b"\x3a\x00")  # list_services
            assert await stream.read()
        with pytest.raises(grpc.aio.AioRpcError, match="streams watch already"):
            await channel.stream_stream(method)(iter([b"\x3a\x00"])).read()
        streams[0].cancel()
        async with asyncio.timeout(PATIENCE):
            while True:
                with suppress(grpc.aio.AioRpcError):
                    if await channel.stream_stream(method)(iter([b"\x3a\x00"])).read():
                        break
                await asyncio.sleep(0.01)


async def test_drain_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",)) as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        watch = aiter(health_stub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING
        stream = r.client.stream("hello", adapter="a", max_new_tokens=150, ignore_eos=True)
        await anext(stream)
        drain = asyncio.create_task(r.server.drain())
        assert (await anext(watch)).status == NOT_SERVING
        with pytest.raises(Draining) as caught:
            await r.client.generate("hello")
        assert caught.value.retry_after > 0
        assert caught.value.metadata["phase"] == "draining"
        events = [event async for event in stream]
        assert isinstance(events[-1], Finished)
        assert events[-1].usage.completion_tokens == 150
        assert await drain == 0
        await r.server.wait()
        with pytest.raises(StopAsyncIteration):
            await anext(watch)  # a watcher did not hold up the end
        with pytest.raises(Unreachable):
            await r.client.generate("hello", timeout=5)
        r.registry.check()
        assert r.at_baseline()


async def test_drain_cancels_what_does_not_end_in_time(tmp_path: Path) -> None:
    async with running(tmp_path, adapters=("a",), drain_timeout=0.05) as r:
        stream = r.client.stream("hello", adapter="a", max_new_tokens=240, ignore_eos=True)
        await anext(stream)
        first, second = await asyncio.gather(r.server.drain(), r.server.drain())
        assert (first, second) == (1, 1)
        with pytest.raises(Draining, match="shutting down"):
            async for _ in stream:
                pass
        assert r.at_baseline()


async def test_a_reader_that_never_reads_does_not_hold_up_the_drain(tmp_path: Path) -> None:
    async def flood(request: Request) -> AsyncIterator[Event]:
        for _ in range(1000):
            yield Delta(0, "x" * 65536, [1])
        yield finished()

    async with running(tmp_path, adapters=("a",), script=flood, send_timeout=60) as r:
        stream = r.client.stream("hello", adapter="a")
        await anext(stream)
        await asyncio.sleep(0.3)
        async with asyncio.timeout(PATIENCE):
            await r.server.drain()
        await r.settle()
        with pytest.raises((Cancelled, Unreachable)):
            async for _ in stream:
                pass


async def test_unix_sockets(tmp_path: Path) -> None:
    async with running(tmp_path / "root", host=f"unix:{tmp_path}/p.sock", admin_host=f"unix:{tmp_path}/a.sock") as r:
        assert r.addresses.public == f"unix:{tmp_path}/p.sock"
        assert (await r.client.model()).model == "fake"
        assert (await r.admin.list()).adapters == ()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_tls_on_both_ports(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, [*command.split(), *names], check=True, capture_output=True)
    roots = cert.read_bytes()
    async with running(tmp_path / "root", tls_cert=cert, tls_key=key, api_key="public-token") as r:
        async with AsyncClient(r.addresses.public, root_certificates=roots, api_key="public-token") as client:
            assert (await client.model()).model == "fake"
        async with AsyncAdminClient(r.addresses.admin, root_certificates=roots) as admin:
            assert (await admin.list()).adapters == ()
        with pytest.raises(Unreachable):  # plain text
            await r.client.model(timeout=5)
    with pytest.raises(StartupError, match="--tls-key: cannot read"):
        async with running(tmp_path / "root", tls_cert=cert, tls_key=tmp_path / "none.pem"):
            pass

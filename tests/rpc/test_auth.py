"""Tokens: who gets through which port, and that a refusal has the arity of the call."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from loramux.client import AsyncAdminClient, AsyncClient
from loramux.errors import Unauthenticated, WrongScope
from loramux.rpc import auth
from loramux.v1.generation_pb2 import GenerateStreamRequest

from tests.rpc.stack import generation_stub, running
from tests.rpc.test_lifecycle import reflection_stub
from tests.rpc.test_refusals import check, refused, req

PUBLIC, ADMIN = "public-token", "admin-token"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "TOKEN_MISSING"),
        ("Bearer wrong-token", "TOKEN_INVALID"),
        ("Bearer ", "TOKEN_INVALID"),
        (f"Basic {PUBLIC}", "TOKEN_INVALID"),
        (PUBLIC, "TOKEN_INVALID"),
        (f"Bearer {PUBLIC}x", "TOKEN_INVALID"),
    ],
)
async def test_without_the_token_nothing_passes(tmp_path: Path, header: str | None, reason: str) -> None:
    async with running(tmp_path, api_key=PUBLIC) as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        metadata = (("authorization", header),) if header is not None else ()
        stub = generation_stub(channel)
        check(await refused(stub.Generate(req(), metadata=metadata)), "UNAUTHENTICATED", reason)
        # A unary handler in place of a streaming one hung, or ended in INTERNAL.
        stream = stub.GenerateStream(GenerateStreamRequest(request=req()), metadata=metadata)
        check(await refused(anext(aiter(stream))), "UNAUTHENTICATED", reason)
        call = reflection_stub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata
        )
        check(await refused(anext(aiter(call))), "UNAUTHENTICATED", reason)


async def test_with_the_token_everything_passes_and_probes_need_none(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=PUBLIC, admin_key=ADMIN) as r:
        assert (await r.client.generate("hi", max_new_tokens=2)).completions
        assert (await r.admin.list()).adapters == ()
        for address in (r.addresses.public, r.addresses.admin):
            async with grpc.aio.insecure_channel(address) as channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                answer = await health.Check(health_pb2.HealthCheckRequest())
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async with grpc.aio.insecure_channel(r.addresses.public) as channel:  # the scheme's case does not matter
            stub = generation_stub(channel)
            assert await stub.Generate(req(), metadata=(("authorization", f"bEARER {PUBLIC}"),))


async def test_a_token_of_the_other_port_is_the_wrong_scope(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=PUBLIC, admin_key=ADMIN) as r:
        async with AsyncAdminClient(r.addresses.admin, api_key=PUBLIC) as admin:
            with pytest.raises(WrongScope):
                await admin.list()
        async with AsyncClient(r.addresses.public, api_key=ADMIN) as client:
            with pytest.raises(WrongScope):
                await client.model()
        for key in (None, "wrong-token"):
            async with AsyncAdminClient(r.addresses.admin, api_key=key) as admin:
                with pytest.raises(Unauthenticated) as caught:
                    await admin.list()
                assert caught.value.metadata["scope"] == "admin"


async def test_refusals_are_counted_and_messages_of_strangers_are_not_parsed(tmp_path: Path) -> None:
    async with running(tmp_path, api_key=PUBLIC) as r, grpc.aio.insecure_channel(r.addresses.public) as channel:
        call: Any = channel.unary_unary("/loramux.v1.GenerationService/Generate")
        check(await refused(call(b"\xff\xff\xff")), "UNAUTHENTICATED", "TOKEN_MISSING")
        sample = r.server.metrics.registry.get_sample_value
        assert sample("loramux_requests_failed_total", {"reason": "TOKEN_MISSING"}) == 1


def test_comparison_takes_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`==` stops at the first byte that differs and so tells, by its time, how much was right."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    guard = auth.BearerAuth("right", scope="public", other_key=None, on_refusal=lambda *_: None)
    assert guard._refusal("right", (("authorization", "Bearer rignt"),)) is not None
    assert guard._refusal("right", (("authorization", "Bearer right"),)) is None
    assert compared == [(b"rignt", b"right"), (b"right", b"right")]

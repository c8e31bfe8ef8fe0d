"""The fuzz targets. Each is a context manager that gives a hypothesis test; what is not documented makes it fail."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from hypothesis import given
from hypothesis import strategies as st
from loramux.client import Client
from loramux.errors import InvalidAdapter, InvalidRequest
from loramux.lora.manifest import read_manifest
from loramux.lora.peft_config import PeftConfig
from loramux.lora.peft_files import read_adapter
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE
from loramux.v1 import adapters_pb2, generation_pb2

from tests.fuzz.strategies import JSON, damaged, messages
from tests.lora import folders
from tests.server.stack import Stack, save_adapter, save_model, serving

Target = Callable[[], None]

# What README and the protos document. INTERNAL, UNKNOWN, UNAVAILABLE and CANCELLED would each be a fault here.
DOCUMENTED = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "PERMISSION_DENIED",
    "ALREADY_EXISTS",
    "ABORTED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
}
SECONDS = 20.0  # deadline of one RPC
YAML_MARKS = (
    *(
        "adapters:",
        "\n",
        "- ",
        "name: ",
        "&a ",
        "*a",
        "<<: ",
        "!!binary ",
        "!!python/object:x ",
        "? ",
        "{",
        "}",
        "[",
        "]",
    ),
    *("2020-99-99", "0x", "1e999", "~", ".nan", "'", '"', "|", ">", "%YAML 9.9", "---", "\t", "  ", "x", ": "),
)


@contextmanager
def adapter_files() -> Iterator[Target]:
    """Damaged configs, headers and weights into the adapter reader: InvalidAdapter or an adapter."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = folders.write(Path(scratch) / "adapter", folders.factors(folders.Q0, folders.K0))
        config, weights = ((folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))
        fields = st.dictionaries(
            st.sampled_from(sorted(PeftConfig.model_fields)) | st.text(max_size=8), JSON, max_size=3
        )
        configs = (
            st.just(config)
            | fields.map(lambda some: json.dumps(folders.config() | some).encode())
            | JSON.map(lambda value: json.dumps(value).encode())
            | damaged(config)
        )
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        entries = st.dictionaries(
            st.sampled_from(sorted(header)) | st.text(max_size=20),
            st.fixed_dictionaries({}, optional={"dtype": JSON, "shape": JSON, "data_offsets": JSON}) | JSON,
            max_size=3,
        )
        files = (
            st.just(weights)
            | entries.map(lambda some: folders.raw(header | some, weights[-512:]))
            | damaged(weights)
            | st.binary(max_size=64)
        )

        @given(configs, files)
        def target(config: bytes, content: bytes) -> None:
            (folder / CONFIG_FILE).write_bytes(config)
            (folder / WEIGHTS_FILE).write_bytes(content)
            try:
                read_adapter(folder, folders.SITES, limits=folders.LIMITS)
            except InvalidAdapter as error:
                assert error.message

        yield target


@contextmanager
def adapters_file() -> Iterator[Target]:
    """Damaged YAML into the reader of adapters files: InvalidRequest or the adapters."""
    good = b"adapters:\n- {name: sql, source: sql/v3, pin: true}\n- name: json\n  digest: sha256:" + b"0" * 64 + b"\n"
    marks = st.sampled_from(YAML_MARKS)
    files = damaged(good) | st.lists(marks, max_size=20).map(lambda m: "".join(m).encode()) | st.binary(max_size=64)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "adapters.yaml"

        @given(files | JSON.map(lambda value: json.dumps({"adapters": value}).encode()))
        def target(content: bytes) -> None:
            path.write_bytes(content)
            try:
                read_manifest(path)
            except InvalidRequest as error:
                assert error.message

        yield target


@contextmanager
def generate() -> Iterator[Target]:
    """Messages full of extreme values to every method of both ports: a documented status, and good requests go on."""
    with _server() as server:
        methods = _methods()
        known = {
            "max_new_tokens": st.sampled_from([0, 1, 4, 8, (1 << 32) - 1]),
            "adapter": st.sampled_from(["", "good", "other", "missing", "../good"]),
            "name": st.sampled_from(["", "good", "other", "missing", "../good"]),
            "seconds": st.sampled_from([0, 1, -1, 1 << 40]),
        }

        @given(st.data())
        def target(data: st.DataObject) -> None:
            method = data.draw(st.sampled_from(methods), "method")
            message = data.draw(messages(method.input_type, known), "message")
            server.send(method, message.SerializeToString())

        yield target


@contextmanager
def raw_bytes() -> Iterator[Target]:
    """Bytes that are no message, or nearly one, to every method of both ports."""
    with _server() as server:
        methods = _methods()
        request = generation_pb2.GenerateRequest(prompt="Hello", adapter="good")
        request.sampling.max_new_tokens = 4
        request.sampling.stop.append("x")
        request.chat.messages.add(role="user", content="Hi")
        contents = damaged(request.SerializeToString()) | st.binary(max_size=256)

        @given(st.sampled_from(methods), contents)
        def target(method: MethodDescriptor, content: bytes) -> None:
            server.send(method, content)

        yield target


TARGETS = {f.__name__: f for f in (adapter_files, adapters_file, generate, raw_bytes)}


def _methods() -> list[MethodDescriptor]:
    services: list[ServiceDescriptor] = [
        generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
        adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"],
    ]
    # A watch ends with its reader only.
    return [method for service in services for method in service.methods if method.name != "WatchAdapters"]


class _Server:
    """A real server with a tiny model in a thread of its own, and the answer that a good request must get."""

    def __init__(self, stack: Stack, public: grpc.Channel, admin: grpc.Channel) -> None:
        self._stack = stack
        self._channels = {"GenerationService": public, "AdapterService": admin}
        self._client = Client(stack.addresses.public, timeout=60)
        self._wanted = self._answer()

    def _answer(self) -> tuple[str, str]:
        base = self._client.generate("Hello", max_new_tokens=4)
        return base.text, self._client.generate("Hello", adapter="kept", max_new_tokens=4).text

    def send(self, method: MethodDescriptor, content: bytes) -> None:
        """Send and read to the end; fails unless the status is documented and good requests get their answer."""
        service = method.containing_service
        channel = self._channels[service.name]
        path = f"/{service.full_name}/{method.name}"
        try:
            if method.server_streaming:
                for _ in channel.unary_stream(path)(content, timeout=SECONDS):
                    pass
            else:
                channel.unary_unary(path)(content, timeout=SECONDS)
            status = "OK"
        except grpc.RpcError as error:
            status = error.code().name  # type: ignore[attr-defined]
        assert status in DOCUMENTED, f"{method.full_name} ended with {status}"
        assert self._stack.application.engine.healthy
        assert self._answer() == self._wanted


@contextmanager
def _server() -> Iterator[_Server]:
    ready: Any = threading.Event()
    over = asyncio.Event()
    found: list[Any] = []

    def run(folder: Path) -> None:
        try:
            asyncio.run(hold(folder))
        finally:
            ready.set()  # also if it could not be started: nobody must wait for it

    async def hold(folder: Path) -> None:
        roots = folder / "adapters"
        for name in ("good", "other", "kept"):
            save_adapter(roots / name, seed=len(name))
        async with serving(save_model(folder / "model"), roots) as stack:
            await stack.admin.load("kept", pin=True)
            found.extend((stack, asyncio.get_running_loop()))
            ready.set()
            await over.wait()

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        thread = threading.Thread(target=run, args=(folder,))
        thread.start()
        stack.callback(thread.join)
        ready.wait()
        running, loop = found
        stack.callback(loop.call_soon_threadsafe, over.set)
        addresses = running.addresses
        channels = [stack.enter_context(grpc.insecure_channel(a)) for a in (addresses.public, addresses.admin)]
        yield _Server(running, *channels)

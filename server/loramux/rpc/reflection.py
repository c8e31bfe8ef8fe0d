"""Server reflection under both of its names: grpc.reflection.v1 and, for older clients, v1alpha.

grpcio-reflection has v1alpha only. The two differ in nothing but the package: v1 here is v1alpha's servicer under the
other name, and a descriptor that is v1alpha's with the package renamed, so that v1 can describe itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1ALPHA: str = reflection.SERVICE_NAME
V1 = "grpc.reflection.v1.ServerReflection"

_FILE = "grpc/reflection/v1/reflection.proto"  # where the protocol's own repository has it


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Let `server` tell of `services`, and of both versions of reflection."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer((*services, V1, V1ALPHA))
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": method}
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, handlers) for name in (V1, V1ALPHA))
    )


def _describe_v1() -> None:
    """Put v1's file into the pool that reflection looks into, unless it is there."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(_FILE)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        text = text_format.MessageToString(file).replace("grpc.reflection.v1alpha", "grpc.reflection.v1")
        renamed = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
        renamed.name = _FILE
        renamed.ClearField("options")  # of generated code: there is none
        pool.AddSerializedFile(renamed.SerializeToString())

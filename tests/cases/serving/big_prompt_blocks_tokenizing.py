"""A few prompts far beyond the context hold all tokenizer threads, long after their callers gave up.

Three prompts of 0.8 MB with deadlines of 0.5 s: a two-letter prompt then waits seconds. Right: what is too long for the
context by its bytes alone is refused before it is tokenized, and the short prompt is answered within a second.
"""

import os
import sys
import time

import grpc
from loramux.v1 import generation_pb2 as pb
from loramux.v1.generation_pb2_grpc import GenerationServiceStub

server = GenerationServiceStub(grpc.insecure_channel(os.environ.get("TARGET", "127.0.0.1:50051")))


def short_prompt() -> float:
    started = time.monotonic()
    server.CountTokens(pb.CountTokensRequest(prompt="hi"), timeout=120)
    return time.monotonic() - started


print(f"a two-letter prompt: {short_prompt():.3f} s")
calls = [server.Generate.future(pb.GenerateRequest(prompt="a " * 400_000), timeout=0.5) for _ in range(3)]
for call in calls:
    try:
        call.result()
    except grpc.RpcError as error:
        print(error.code().name, (error.details() or "")[:80])
late = short_prompt()
print(f"the same after three callers with 0.8 MB each have left: {late:.3f} s")
sys.exit(1 if late > 1 else 0)

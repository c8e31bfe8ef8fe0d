"""Cancelled requests and passed deadlines are in no metric: not the tokens delivered, not the outcome.

Three streams cancelled after a few tokens and three calls whose deadline passes: no counter moves. Right: tokens count
as they are delivered, and each of the six requests counts once, by its outcome.
METRICS is the address of /metrics.
"""

import os
import sys
import time
import urllib.request

import grpc
from loramux.v1 import generation_pb2 as pb
from loramux.v1.generation_pb2_grpc import GenerationServiceStub

server = GenerationServiceStub(grpc.insecure_channel(os.environ.get("TARGET", "127.0.0.1:50051")))
url = f"http://{os.environ.get('METRICS', '127.0.0.1:9400')}/metrics"


def counters() -> dict[str, float]:
    text = urllib.request.urlopen(url, timeout=20).read().decode()
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in rows if name.partition("{")[0].endswith("_total")}


def story() -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="Story", sampling=pb.SamplingParams(max_new_tokens=2000, ignore_eos=True))


before, received = counters(), 0
for _ in range(3):
    call, seen = server.GenerateStream(pb.GenerateStreamRequest(request=story()), timeout=60), 0
    for event in call:
        seen += len(event.delta.token_ids)
        if seen >= 3:
            break
    call.cancel()
    received += seen
for _ in range(3):
    try:
        server.Generate(story(), timeout=0.7)
    except grpc.RpcError as error:
        print(error.code().name)
time.sleep(3)
moved = {name: value - before.get(name, 0) for name, value in counters().items() if value != before.get(name, 0)}
print(f"{received} tokens were received; counters that moved: {moved}")
tokens = sum(value for name, value in moved.items() if "generation_tokens_total" in name)
outcomes = sum(value for name, value in moved.items() if "request" in name and "adapter" not in name)
print(f"tokens counted {tokens:.0f}, outcomes counted {outcomes:.0f} of 6")
sys.exit(0 if tokens >= received and outcomes >= 6 else 1)

"""Four requests with a list of a million items each (4 MB, within the message limit) stall the event loop.

The lists are copied or checked item by item before their number is looked at. Right: refused by the length of the list
alone; GetModel stays within a quarter of a second of its quiet time.
"""

import sys

from case import flood
from loramux.v1 import generation_pb2 as pb

one = pb.SamplingParams(max_new_tokens=1)
quiet, _ = flood(pb.GenerateRequest(prompt="x", sampling=one), 1, timeout=60)
print(f"quiet: {quiet:.2f} s")
fault = False
for field, request in {
    "token_ids": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 4_194_000), sampling=one),
    "stop_token_ids": pb.GenerateRequest(
        prompt="x", sampling=pb.SamplingParams(max_new_tokens=1, stop_token_ids=range(1_000_000))
    ),
}.items():
    longest, outcomes = flood(request, 4, timeout=60)
    print(f"{field}: {set(outcomes)}; GetModel meanwhile took {longest:.2f} s at most")
    fault |= longest > quiet + 0.25 or not all(o.startswith("INVALID_ARGUMENT") for o in outcomes)
sys.exit(1 if fault else 0)

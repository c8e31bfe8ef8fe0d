"""A safetensors header with one tensor of 40,000 dimensions (680 kB) freezes the whole server for seconds.

Multiplying the sizes takes quadratic time and holds the interpreter; the limits allow headers of 16 MiB, and the load's
timeout cannot stop it. Right: a shape of more than a few dimensions is refused first; GetModel stays below 1 s.
"""

import os
import sys
import time
from pathlib import Path

from case import LORA, flood, weights, write
from loramux.v1 import generation_pb2 as pb

shape = {"dtype": "F32", "shape": [2**47] * 40_000, "data_offsets": [0, 0]}
write(Path(os.environ["ROOT"]), "dims", weights({LORA + "A.weight": shape}))
time.sleep(7)  # by then it is registered, at the default scan interval
request = pb.GenerateRequest(prompt="x", adapter="dims", sampling=pb.SamplingParams(max_new_tokens=1))
longest, outcomes = flood(request, 1, timeout=60)
print(f"the load: {outcomes}; GetModel meanwhile took {longest:.2f} s at most")
sys.exit(0 if longest < 1 and not outcomes[0].startswith(("OK", "DEADLINE", "NOT_FOUND")) else 1)

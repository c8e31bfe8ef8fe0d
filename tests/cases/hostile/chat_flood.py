"""One chat of 500,000 empty turns (4 MB, within the limits) stalls the event loop for seconds and takes 400 MB.

All turns are copied and rendered before anything is refused. Right: refused by the number of turns, or by the least
tokens that they take, before they are copied; GetModel stays below 1 s.
"""

import sys

from case import flood
from loramux.v1 import generation_pb2 as pb

turns = pb.Chat(messages=[pb.ChatMessage(role="user")] * 500_000)
request = pb.GenerateRequest(chat=turns, sampling=pb.SamplingParams(max_new_tokens=1))
longest, outcomes = flood(request, 1, timeout=5)
print(f"the chat: {outcomes}; GetModel meanwhile took {longest:.2f} s at most")
sys.exit(0 if longest < 1 and outcomes[0].startswith("INVALID_ARGUMENT") else 1)

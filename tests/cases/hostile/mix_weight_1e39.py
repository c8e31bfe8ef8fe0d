"""One request with a mix weight of 1e39 ends every running request of other clients with INTERNAL.

The weight is finite in a double and not in a float; the whole step fails. Repeated, /healthz turns to 503. Right: such
a weight is refused at the door; 12 of 12 requests beside it end well, and the server stays healthy.
"""

import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

from case import ADMIN, METRICS, TARGET, lora, write
from loramux.client import AdminClient, Client
from loramux.errors import LoramuxError

write(Path(os.environ["ROOT"]), "heavy", lora(value=0.01))
AdminClient(ADMIN, timeout=60).load("heavy", replace=True)
client, victims = Client(TARGET, timeout=120), Counter()


def victim(i: int) -> None:
    try:
        client.generate(f"Victim {i}", max_new_tokens=40, ignore_eos=True)
        victims["OK"] += 1
    except LoramuxError as error:
        victims[error.reason] += 1


def attack(weight: float) -> str:
    try:
        client.generate("x", mix={"heavy": weight}, max_new_tokens=1)
        return "OK"
    except LoramuxError as error:
        return f"{error.status} {error.reason}"


threads = [threading.Thread(target=victim, args=(i,)) for i in range(12)]
for thread in threads:
    thread.start()
time.sleep(1.5)
print("attacker:", attack(1e39))
for thread in threads:
    thread.join()
print("the 12 beside it:", dict(victims))
print("20 more, alone:", dict(Counter(attack(-1e300) for _ in range(20))))
try:
    health = urllib.request.urlopen(f"http://{METRICS}/healthz", timeout=20).status
except urllib.error.HTTPError as error:
    health = error.code
print("/healthz", health)
client.generate("Once more", max_new_tokens=1)
sys.exit(0 if victims["OK"] == 12 and health == 200 else 1)

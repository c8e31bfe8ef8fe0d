"""A bad value in the adapters file (name: 2020-99-99) ends the watch without a log line; later files are never applied.

A ValueError out of the YAML reader escapes. Right: the bad file is logged and changes nothing, the corrected one is
applied. Starts a server of its own.
"""

import os
import sys
import time

from case import lora, scratch, write
from loramux.client import AdminClient
from own_server import server

root = scratch()
write(root, "plain", lora())
file = root / "adapters.yaml"


def declare(*names: str) -> None:
    text = "adapters:\n" + "".join(f"- {{name: {name}, source: plain}}\n" for name in names)
    (root / "new").write_text(text)
    os.replace(root / "new", file)
    time.sleep(5)


declare("first")
flags = ("--adapter-dir", str(root), "--adapters-file", str(file), "--adapter-scan-interval", "1")
with server(*flags) as own:
    if not own.ready:
        print(own.log.read_text()[-500:])
        sys.exit(2)
    admin, seen = AdminClient(own.admin, timeout=60), {}
    for last in ("second", "2020-99-99", "third"):
        declare("first", last)
        seen[last] = [adapter.name for adapter in admin.list().adapters]
        print("declared first and", last, "-> there are", seen[last])
    logged = any(level in own.log.read_text() for level in (" W loramux", " E loramux"))
    print("the bad file is logged:", logged)
kept = "second" in seen["second"] and "second" in seen["2020-99-99"]
sys.exit(0 if kept and "third" in seen["third"] and logged else 1)

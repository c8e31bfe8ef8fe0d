"""A tensor named [/bold]x in one adapter breaks `loramux adapters list` for the operator: a traceback, no list at all.

The error's text is printed as markup. Right: text from files is printed as it is; `list` and `show` exit with 0.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from case import ADMIN, LORAMUX, TARGET, lora, write
from loramux.client import Client
from loramux.errors import LoramuxError

write(Path(os.environ["ROOT"]), "marked", lora("[/bold]x.lora_A.weight"))
time.sleep(7)  # by then it is registered, at the default scan interval
try:
    Client(TARGET, timeout=60).generate("x", adapter="marked", max_new_tokens=1)
except LoramuxError as error:
    print("request:", error.message[:120])
fault = False
for words in (["list"], ["show", "marked"]):
    command = [*LORAMUX, "adapters", *words, "--admin", ADMIN]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    print(words, "-> exit code", run.returncode, (run.stderr.strip().splitlines() or [""])[-1][:120])
    fault |= run.returncode != 0 or "marked" not in run.stdout
sys.exit(1 if fault else 0)

"""A folder that is exchanged for a link between the check and the opening is read outside the roots.

The digest proves it: of some 2,000 validations 30 were of the folder outside, others ended INTERNAL. Right: what is
opened is what was checked (openat2 with RESOLVE_BENEATH, or a look at the opened file's path); never INTERNAL.
"""

import ctypes
import os
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from case import ADMIN, lora, scratch, write
from loramux.client import AdminClient
from loramux.errors import LoramuxError

ROOT, EXCHANGE, HERE = Path(os.environ["ROOT"]), 2, -100
rename = ctypes.CDLL(None, use_errno=True).renameat2
write(ROOT, "inner", lora(value=0.01))
write(ROOT, "twin", lora(value=0.02))  # same content as the one outside: gives its digest
outside = write(scratch(), "outside", lora(value=0.02))
link = ROOT / ".swap"
link.unlink(missing_ok=True)
link.symlink_to(outside)
admin = AdminClient(ADMIN, timeout=30)
forbidden = admin.load("checked", "twin", validate_only=True).digest
going = True


def swap() -> None:
    while going:
        rename(HERE, os.fsencode(ROOT / "inner"), HERE, os.fsencode(link), EXCHANGE)


thread = threading.Thread(target=swap)
thread.start()
seen, end = Counter(), time.monotonic() + 15
while time.monotonic() < end:
    try:
        digest = admin.load("checked", "inner", validate_only=True).digest
        seen["OUTSIDE THE ROOT" if digest == forbidden else "inside"] += 1
    except LoramuxError as error:
        seen[f"{error.status} {error.reason}"] += 1
going = False
thread.join()
for path in (link, ROOT / "inner"):  # whichever is the link now
    path.unlink() if path.is_symlink() else shutil.rmtree(path)
print(dict(seen))
sys.exit(1 if seen["OUTSIDE THE ROOT"] or any(key.startswith("INTERNAL") for key in seen) else 0)

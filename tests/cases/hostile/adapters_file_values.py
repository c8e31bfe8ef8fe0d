"""Values that the YAML reader itself stumbles over escape as ValueError or RecursionError instead of InvalidRequest.

A date or a time zone that does not exist, nesting without end. Right: every bad file raises InvalidRequest that names
the file. Needs no server.
"""

import sys

from case import scratch
from loramux.errors import InvalidRequest
from loramux.lora.manifest import read_manifest

file, fault = scratch() / "adapters.yaml", False
for what, text in {
    "bad date": "adapters:\n- {name: 2020-99-99}\n",
    "bad time zone": "a: 2001-12-14t21:59:43.10-99:99\n",
    "bad number": "adapters:\n- {name: 0x}\n- {pin: 0b}\n",
    "deep nesting": "adapters: " + "[" * 20_000,
    "bad binary": 'adapters: !!binary "a"\n',
}.items():
    file.write_text(text)
    try:
        read_manifest(file)
        said, right = "accepted", False
    except InvalidRequest as error:
        said, right = error.message[-100:], True
    except Exception as error:  # what must not escape
        said, right = f"{type(error).__name__}: {str(error)[:80]}", False
    print("right:" if right else "FAULT:", what, "->", said)
    fault |= not right
sys.exit(1 if fault else 0)

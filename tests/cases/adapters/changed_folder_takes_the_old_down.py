"""A served folder changes into one that does not load (half copied, a wrong file): every request fails from then on.

The scan puts the new version in the name's place at once, although the old one was in memory. `adapters load --replace`
with the same files keeps the old one. Right: the scan keeps it too, and tells of the new one that does not load.
"""

import json
import time

from case import ROOT, SCAN, ask, done, expect, factors, load, same, write

write("v", factors(seed=2))
time.sleep(SCAN)
before = ask("v")
print("before", before)
config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
(ROOT / "v/adapter_config.json").write_text(json.dumps(config))
time.sleep(SCAN)
after = ask("v")
print("after the scan", after)
expect(same(before, after), "the scan keeps the version that works")

write("w", factors(seed=3))
print(load("w"))
kept = ask("w")
print("replaced by hand with the bad one:", load("w", "v")[:80])
expect(same(kept, ask("w")), "`load --replace` keeps the version that works")
done()

"""Policy and the faces' side of the engine are usable without torch."""

from __future__ import annotations

import subprocess
import sys

TORCH_FREE = (
    "client detokenizer door group kv_cache request scheduler sequence settings stats stop_strings stream uniform"
)


def test_policy_imports_no_torch() -> None:
    modules = ", ".join(f"loramux.engine.{name}" for name in TORCH_FREE.split())
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

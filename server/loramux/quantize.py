"""`loramux quantize`: a model to an NF4 checkpoint folder, complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from loramux.errors import StartupError
from loramux.model.checkpoint import write_checkpoint
from loramux.model.sources import open_source


def quantize_to(source: str, out: Path, progress: Callable[[int, int], None]) -> int:
    """Quantize `source` into the new folder `out` and return its size in bytes.

    Raises StartupError if the source cannot be read or `out` exists.
    """
    if out.exists():
        raise StartupError(f"{out} exists already; name a new folder")
    if not out.parent.is_dir():
        raise StartupError(f"{out.parent} is no folder to write into")
    opened = open_source(source)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        for done, total in write_checkpoint(opened, scratch):
            progress(done, total)
        scratch.chmod(0o755)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(path.stat().st_size for path in out.iterdir())

"""`loramux quantize`: a model to an NF4 checkpoint folder, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loramux.model.checkpoint import write_checkpoint
from loramux.model.sources import open_source
from loramux.new_folder import check_new, new_folder


def quantize_to(source: str, out: Path, progress: Callable[[int, int], None]) -> int:
    """Quantize `source` into the new folder `out` and return its size in bytes.

    Raises StartupError if the source cannot be read, FolderExists or InvalidRequest if `out` cannot be made.
    """
    check_new(out)
    opened = open_source(source)
    with new_folder(out) as scratch:
        for done, total in write_checkpoint(opened, scratch):
            progress(done, total)
    return sum(path.stat().st_size for path in out.iterdir())

"""Where loramux keeps what it makes once: compiled operations, the embedded model, adapters from a hub."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def cache_root() -> Path:
    """$LORAMUX_CACHE, else ~/.cache/loramux. Raises OSError where neither is known: a container's user may have no
    home."""
    given = os.environ.get("LORAMUX_CACHE")
    if given:
        return Path(given).expanduser()
    try:
        return Path.home() / ".cache" / "loramux"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder; name one in LORAMUX_CACHE") from None

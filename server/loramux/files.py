"""Small files that are read whole, whatever lies in their place. Imports no torch."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

SMALL = 1 << 20  # bytes: more than any file of settings, certificates or keys has


def read_file(path: Path, most: int = SMALL) -> bytes:
    """What the regular file `path` holds, at most `most` bytes.

    Raises OSError, its `strerror` in words for an operator: for a larger file, too, and for a pipe, a device or a
    socket, process substitution and a piped /dev/stdin among them. Those are never waited for: nothing says that their
    writer will ever come, and what is read twice (a certificate) or again after a restart would not be there.
    """
    try:
        with open(path, "rb", opener=at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file; pipes and devices are not read", str(path))
            content = file.read(most + 1)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None  # a NUL, or what no file name can hold
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return content


def at_once(path: str, flags: int) -> int:
    """An opener that a pipe without a writer does not hold up."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)

"""Opening what lies beneath an open folder, so that nothing can lead out of it. Imports no torch.

A path that was looked at may be another one when it is opened: somebody exchanges a folder for a link in between. So
what is opened is given as the real path, and no component of it may be a link, which the kernel sees to.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # so that a pipe in a file's place holds nobody up
# What opening answers where a component is a link, or was exchanged meanwhile.
LINK_ERRORS = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EXDEV, errno.EAGAIN})

_OPENAT2 = 437  # linux/unistd.h, on every architecture of today; openat2(2), since Linux 5.6
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x02, 0x04, 0x08  # linux/openat2.h
_RETRIES = 16


class _How(ctypes.Structure):
    """struct open_how."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(folder: int, path: str, flags: int) -> int:
    """A descriptor of `path`, which is relative to the descriptor `folder` and has neither links nor `..` in it.

    By openat2 where the kernel has it and lets us, else component by component. Raises OSError, with one of
    LINK_ERRORS for a path that has a link or leads out.
    """
    opened = _openat2(folder, path, flags)
    return walk_beneath(folder, path, flags) if opened is None else opened


def walk_beneath(folder: int, path: str, flags: int) -> int:
    """What open_beneath does, without openat2."""
    *parents, last = [part for part in path.split("/") if part not in ("", ".")] or ["."]
    if path.startswith("/") or ".." in (*parents, last):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    current = folder
    try:
        for part in parents:
            below = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=current)
            if current != folder:
                os.close(current)
            current = below
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=current)
    finally:
        if current != folder:
            os.close(current)


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _openat2(folder: int, path: str, flags: int) -> int | None:
    """None where there is no such call: an older kernel, or a sandbox that does not know it."""
    global _libc
    if _libc is None:
        return None
    how = _How(flags | os.O_CLOEXEC, 0, _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH)
    name = ctypes.c_char_p(os.fsencode(path))
    for _ in range(_RETRIES):
        opened = _libc.syscall(
            ctypes.c_long(_OPENAT2), ctypes.c_long(folder), name, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
        )
        if opened >= 0:
            return int(opened)
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):  # a signal; a rename beside us
            break
    if code in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
        _libc = None
        return None
    raise OSError(code, os.strerror(code), path)

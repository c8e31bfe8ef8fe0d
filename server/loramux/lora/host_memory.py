"""Memory for an adapter's file and for its buffer: tens of megabytes that come and go. Imports no torch.

Mapped rather than taken from the heap: it starts at a page, goes back to the system the moment nothing uses it, and may
be of huge pages, which take fewer faults to fill for the first time.
"""

from __future__ import annotations

import contextlib
import mmap


def allocate(nbytes: int) -> mmap.mmap:
    """`nbytes` of zeros, writable through the buffer protocol, beginning at a page; freed with its last user."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel or a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory

"""An adapter's buffer on its way to a CUDA device, beside what the device computes. Called in worker threads."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Pinned memory at a time: an adapter of usual size is one or two. Torch keeps such pieces for the next adapter, and
# rounds them up to a power of two, so that whole adapters would hold up to twice their size for good.
PIECE_BYTES = 64 << 20


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """host [N], contiguous, as one allocation on `device`: all of it is there when this returns, for every stream.

    On a CUDA device the copy runs on a stream of its own, on which the memory is taken, too: what was there before was
    freed there or waits for its last users (`record_stream`), so that nothing that computes is waited for or
    overwritten. Raises torch.OutOfMemoryError.
    """
    if device.type != "cuda":
        return host.to(device)
    stream = _stream(device)
    arrived = torch.cuda.Event(blocking=True)  # else the wait would spin on a core
    with torch.cuda.stream(stream):
        buffer = torch.empty(host.shape, dtype=host.dtype, device=device)
        count = PIECE_BYTES // host.dtype.itemsize
        for piece, target in zip(host.split(count), buffer.split(count), strict=True):
            pinned = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True)
            target.copy_(pinned.copy_(piece), non_blocking=True)  # torch reuses `pinned` only after that
        arrived.record(stream)
    arrived.synchronize()
    # Steps read it on the default stream; freed, it is given out again only once they have.
    buffer.record_stream(torch.cuda.default_stream(device))
    return buffer


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

"""Errors that a device reports: which concern a step, and which are the end of the process.

After an illegal address, an uncorrectable memory error or a failed launch every call of the process to the device
fails with the same error, whatever it is for: CUDA gives no way back but a new process. What asks for more than there
is (memory, registers, a grid too large) leaves the device as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loramux.errors import DeviceLost

# How torch (of any version) and Triton begin what they report of CUDA.
_PREFIXES = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]")
# CUDA's own sentences; torch reports some of them as AcceleratorError.
_NO_MEMORY = ("out of memory", "cublas_status_alloc_failed")
_SURVIVED = (
    "invalid configuration argument",
    "invalid argument",
    "too many resources requested for launch",
    "operation not permitted when stream is capturing",
    "operation failed due to a previous error during capture",
    "no kernel image is available",
)
_LOST = (
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "hardware stack error",
    "unspecified launch failure",
    "launch failed",
    "launch timed out",
    "device-side assert",
    "ecc error",
    "nvlink error",
    "context is destroyed",
    "device is busy or unavailable",
    "unknown error",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory for what was asked."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _reported(error) and _says(error, _NO_MEMORY)


def is_lost(error: BaseException) -> bool:
    """Whether after this error every call to the device would fail."""
    if not isinstance(error, RuntimeError) or out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return not _says(error, _SURVIVED)
    return _reported(error) and _says(error, _LOST)


@contextmanager
def device_errors() -> Iterator[None]:
    """Raises DeviceLost in the place of an error after which every call to the device would fail."""
    try:
        yield
    except Exception as error:
        if is_lost(error):
            raise DeviceLost(str(error)) from error
        raise


def _reported(error: RuntimeError) -> bool:
    return isinstance(error, torch.AcceleratorError) or str(error).startswith(_PREFIXES)


def _says(error: RuntimeError, sentences: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(sentence in text for sentence in sentences)

"""Which errors of a device end the process, which a step, and which are none of it."""

from __future__ import annotations

import pytest
import torch
from loramux.errors import DeviceLost
from loramux.ops.device import device_errors, is_lost, out_of_memory

LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    torch.AcceleratorError("CUDA error: a sentence of a later CUDA"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: misaligned address"),
]
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
OF_A_STEP = [
    torch.AcceleratorError("CUDA error: invalid configuration argument"),
    torch.AcceleratorError("CUDA error: too many resources requested for launch"),
    torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture"),
    RuntimeError("an illegal memory access, says somebody else"),
    ValueError("CUDA error: device-side assert triggered"),
]


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("error", LOST, ids=said)
def test_after_these_no_call_succeeds(error: Exception) -> None:
    assert is_lost(error)
    assert not out_of_memory(error)
    with pytest.raises(DeviceLost) as caught, device_errors():
        raise error
    assert caught.value.__cause__ is error
    assert not isinstance(caught.value, Exception), "else it would end one request, and the others would go on"


@pytest.mark.parametrize("error", [*NO_MEMORY, *OF_A_STEP], ids=said)
def test_these_leave_the_device_as_it_was(error: Exception) -> None:
    assert not is_lost(error)
    assert out_of_memory(error) == (error in NO_MEMORY)
    with pytest.raises(type(error)) as caught, device_errors():
        raise error
    assert caught.value is error

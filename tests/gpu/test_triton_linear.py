"""The linear kernels' own tests, on the device: `make gpu-check` runs what is under tests/gpu."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_triton_linear import *  # noqa: F403

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

"""The NF4 weight against the format's definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loramux.ops.nf4 import NF4Weight
from loramux.ops.reference import dequantize


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 200), seed=st.integers(0, 1000))
def test_dequantize_follows_the_format_whatever_the_shape(n: int, k: int, seed: int) -> None:
    """bitsandbytes' CPU kernel is wrong in silence where K is no multiple of 64, unless the weight is flat."""
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    weight = NF4Weight.quantize(dense)
    torch.testing.assert_close(weight.dequantize(torch.float32), dequantize(weight), rtol=0, atol=1e-6)
    # The widest gap between NF4 values is 0.30 of a block's absmax (-1 to -0.70); double quantization adds some.
    assert (dequantize(weight) - dense).abs().max() <= 0.25 * dense.abs().max()


def test_checkpoint_round_trip_is_exact() -> None:
    weight = NF4Weight.quantize(torch.randn(96, 192))
    entries = weight.to_checkpoint("layer.weight")
    codes = entries.pop("layer.weight")
    again = NF4Weight.from_checkpoint(codes, {k.removeprefix("layer.weight."): v for k, v in entries.items()})
    assert again.shape == (96, 192)
    assert torch.equal(dequantize(again), dequantize(weight))


def test_without_double_quantization_the_scales_are_kept_as_they_are() -> None:
    from bitsandbytes import functional as bnb

    dense = torch.randn(64, 128)
    codes, state = bnb.quantize_4bit(dense, blocksize=64, compress_statistics=False, quant_type="nf4")
    weight = NF4Weight.from_checkpoint(codes, state.as_dict(packed=True))
    assert torch.equal(dequantize(weight), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_would_poison_a_block_are_refused(value: float) -> None:
    dense = torch.randn(4, 64)
    dense[1, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        NF4Weight.quantize(dense)


def test_other_block_sizes_are_refused() -> None:
    from bitsandbytes import functional as bnb

    codes, state = bnb.quantize_4bit(torch.randn(64, 128), blocksize=128, quant_type="nf4")
    with pytest.raises(ValueError, match="128"):
        NF4Weight.from_checkpoint(codes, state.as_dict(packed=True))

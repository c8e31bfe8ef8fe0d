"""The whole stack on Triton's kernels (tests.ops.triton_device says where) against the reference backend."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from loramux.errors import StartupError
from loramux.model.causal_lm import CausalLM, flat_inputs
from loramux.model.loading import load_model
from loramux.ops import select
from loramux.ops.backend import LinearPart
from loramux.ops.cuda.backend import TritonBackend
from loramux.ops.cuda.dense import DenseLinear
from loramux.ops.dense import DenseWeight
from loramux.ops.nf4 import NF4Weight
from loramux.ops.reference import ReferenceBackend
from loramux.ops.segment import AdapterWeights, LoraWeights, Segment
from torch.nn import functional as F

from tests.model.tiny import greedy_flat, save_tiny
from tests.ops.test_native import flat
from tests.ops.triton_device import DEVICE, sum_all_rows_alike

BLOCK = 4
PROMPTS = [[5, 17, 99, 3, 42, 8], [7, 7, 12], [101, 44, 55, 66], [9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=1))


@pytest.fixture(scope="module")
def reference(folder: str) -> CausalLM:
    return load_model(folder, device="cpu", dtype="bf16", backend=ReferenceBackend()).model


def load(folder: str, dtype: str, *, batch_invariant: bool = False) -> CausalLM:
    backend = TritonBackend(DEVICE, batch_invariant=batch_invariant)
    model = load_model(folder, device=DEVICE.type, dtype=dtype, backend=backend, batch_invariant=batch_invariant).model
    assert model.shortcut is not None
    return model


def make_adapter(model: CausalLM, rank: int, *, bias: bool = False, scale: bool = False) -> AdapterWeights:
    """Strong enough to change most answers."""
    g = torch.Generator().manual_seed(rank)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) / 6).to(model.dtype)

    return flat(
        [
            LoraWeights(
                draw(rank, s.in_features),
                draw(s.out_features, rank),
                bias=draw(s.out_features) if bias else None,
                scale=1 + draw(s.out_features).float() if scale else None,
            )
            for s in model.sites
        ]
    )


def mixed(adapters: Sequence[AdapterWeights]) -> list[Segment]:
    """By sequences: a DoRA, a mix of two, and the base."""
    return [
        Segment(0, 1, 1.0, adapters[0]),
        Segment(1, 3, 0.75, adapters[1]),
        Segment(1, 3, -0.5, adapters[2]),
    ]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the adapters here are on the CPU")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_greedy_answers_are_the_reference_s_before_and_after_a_swap(
    folder: str, reference: CausalLM, dtype: str
) -> None:
    model = load(folder, dtype)
    first = [make_adapter(reference, 5, scale=True), make_adapter(reference, 3), make_adapter(reference, 17, bias=True)]
    second = [make_adapter(reference, 2, scale=True), make_adapter(reference, 33), make_adapter(reference, 1)]
    seen = []
    for adapters in (first, second):
        expected = greedy_flat(reference, PROMPTS, 3, mixed(adapters))
        mine = [flat([_cast(adapter[i], model.dtype) for i in range(len(adapter))]) for adapter in adapters]
        assert greedy_flat(model, PROMPTS, 3, mixed(mine), chunk=4) == expected
        seen.append(expected)
    assert seen[0] != seen[1]


def _cast(w: LoraWeights, dtype: torch.dtype) -> LoraWeights:
    return LoraWeights(w.a.to(dtype), w.b.to(dtype), None if w.bias is None else w.bias.to(dtype), w.scale)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the adapters here are on the CPU")
def test_batch_invariant_to_the_last_bit(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, beside others, in chunks: the same logits."""
    sum_all_rows_alike(monkeypatch)
    model = load(folder, "bf16", batch_invariant=True)
    adapters = [make_adapter(model, 5, scale=True), make_adapter(model, 3), make_adapter(model, 17, bias=True)]
    prompt, other = PROMPTS[0], PROMPTS[2]
    model.allocate_kv(32, BLOCK)
    alone = model.forward(flat_inputs([(prompt, 0)], BLOCK, [Segment(0, 6, 1.0, adapters[2])], "last"))[0].clone()
    company = [Segment(0, 4, 1.0, adapters[0]), Segment(4, 10, 1.0, adapters[2]), Segment(11, 12, 0.5, adapters[1])]
    together = model.forward(flat_inputs([(other, 0), (prompt, 0), ([1, 2], 0)], BLOCK, company, "last", 16))[1].clone()
    model.forward(flat_inputs([(prompt[:5], 0)], BLOCK, [Segment(0, 5, 1.0, adapters[2])], "last", 16))
    chunked = model.forward(flat_inputs([(prompt, 5)], BLOCK, [Segment(0, 1, 1.0, adapters[2])], "last", 16))[0]
    assert torch.equal(alone, together)
    assert torch.equal(alone, chunked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_dense(rows: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*s, generator=g).to(DEVICE, dtype) for s in ((rows, 100), (70, 100), (70,)))
    unbound = TritonBackend(DEVICE).bind(())
    for b in (None, bias):
        expected = F.linear(x.float(), weight.float(), None if b is None else b.float())
        for invariant in (False, True):
            y = DenseLinear(weight, b, invariant=invariant).run(x, unbound)
            torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=2e-2)


def test_what_the_kernels_do_not_take() -> None:
    odd = LinearPart(NF4Weight.quantize(torch.randn(16, 96)).to(DEVICE))
    dense = LinearPart(DenseWeight(torch.randn(16, 64).to(DEVICE, torch.bfloat16)))
    for part in (odd, dense):
        backend = TritonBackend(DEVICE)
        x = torch.randn(3, part.weight.shape[1]).to(DEVICE, torch.bfloat16)
        (y,) = backend.prepare([part], [0])(x, backend.bind(()))
        expected = x.float() @ part.weight.dequantize(torch.float32).T
        torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=0.3)
        with pytest.raises(StartupError, match="--batch-invariant"):
            TritonBackend(DEVICE, batch_invariant=True).prepare([part], [0])


class TestSelection:
    """Which backend a GPU gets; none is here, so torch is asked about one that is not there."""

    def chosen(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
        monkeypatch.setattr("loramux.ops.cuda.backend.bind", lambda *_: None)
        return select.select_backend(torch.device("cuda"), dtype, batch_invariant=True).name

    def test_of_a_new_card(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        assert self.chosen(monkeypatch, (9, 0), torch.bfloat16) == "triton, batch invariant"
        assert "a card (compute capability 9.0, bfloat16): Triton kernels" in caplog.text
        assert self.chosen(monkeypatch, (8, 0), torch.float16) == "triton, batch invariant"
        assert self.chosen(monkeypatch, (9, 0), torch.float32) == "torch + bitsandbytes"

    def test_of_an_old_card(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        assert self.chosen(monkeypatch, (7, 5), torch.float16) == "torch + bitsandbytes"
        assert "a card (compute capability 7.5, float16): no Triton kernels" in caplog.text


def test_batch_invariance_that_cannot_be_had_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"--batch-invariant: torch \+ bitsandbytes on cpu in fp32"):
        load_model(folder, device="cpu", dtype="fp32", batch_invariant=True)
    assert load_model(folder, device="cpu", dtype="bf16", batch_invariant=True).model.backend.batch_invariant


def test_without_a_cache_on_disk_the_model_is_not_blamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Told before the weights are read; it was the self-test's failure after that."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(StartupError, match="TRITON_CACHE_DIR"):
        TritonBackend(torch.device("cuda"))

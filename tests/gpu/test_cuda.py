"""What matters on a GPU: operations against the reference, decoding against transformers, a mixed batch over gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from loramux.model.loading import dequantized_model, load_model
from loramux.ops.backend import Backend, LinearPart, SiteSegment
from loramux.ops.nf4 import NF4Weight
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch
from loramux.ops.reference import ReferenceBackend, dequantize
from loramux.ops.segment import LoraWeights
from loramux.ops.select import select_backend

from tests.model.tiny import FAMILIES, greedy_flat, save_tiny
from tests.server.stack import save_adapter, save_model, serving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REFERENCE = ReferenceBackend()


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="module")
def backend(cuda: torch.device) -> Backend:
    return select_backend(cuda, torch.bfloat16)


@pytest.mark.parametrize("shape", [(64, 64), (96, 80), (256, 4096)])
def test_dequantize(cuda: torch.device, shape: tuple[int, int]) -> None:
    weight = NF4Weight.quantize(torch.randn(*shape, device=cuda))
    torch.testing.assert_close(weight.dequantize(torch.float32), dequantize(weight), rtol=0, atol=1e-6)
    on_cpu = weight.to(torch.device("cpu"))
    torch.testing.assert_close(dequantize(on_cpu), dequantize(weight).cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(backend: Backend, cuda: torch.device, rows: int, dtype: torch.dtype) -> None:
    g = torch.Generator(device=cuda).manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=cuda)

    k, widths = 256, (128, 64, 64)
    parts = [LinearPart(NF4Weight.quantize(draw(n, k) / 16), draw(n).to(dtype)) for n in widths]
    segments = [
        SiteSegment(
            start,
            min(rows, start + 1 + i),
            1.0 - 0.25 * i,
            tuple(
                LoraWeights((draw(r, k) / 16).to(dtype), (draw(n, r) / r**0.5).to(dtype)) if (i + j) % 3 else None
                for j, n in enumerate(widths)
            ),
        )
        for i, r in enumerate((1, 3, 16, 200))
        if (start := i * rows // 5) < rows
    ]
    x = draw(rows, k).to(dtype)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 8e-2}
    for y, e in zip(backend.linear(x, parts, segments), REFERENCE.linear(x, parts, segments), strict=True):
        torch.testing.assert_close(y, e, **tolerance)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention(backend: Backend, cuda: torch.device, window: int | None, softcap: float | None) -> None:
    g = torch.Generator(device=cuda).manual_seed(0)
    block, contexts, starts = 16, (1, 40, 70), (0, 1, 2, 42)
    cache = LayerCache.allocate(16, block, 2, 64, 64, torch.bfloat16, cuda)
    cache.keys.normal_(generator=g)
    cache.values.normal_(generator=g)
    tables = torch.tensor([[3, 0, 0, 0, 0], [9, 2, 7, 0, 0], [1, 4, 5, 6, 8]], dtype=torch.int32, device=cuda)
    slots = []
    for s, context in enumerate(contexts):
        for p in range(context - (starts[s + 1] - starts[s]), context):
            slots.append(int(tables[s, p // block]) * block + p % block)
    batch = PagedBatch(
        torch.tensor(slots, device=cuda),
        torch.tensor(starts, dtype=torch.int32, device=cuda),
        torch.tensor(contexts, dtype=torch.int32, device=cuda),
        tables,
        starts,
        contexts,
    )
    q, k, v = (torch.randn(starts[-1], heads, 64, generator=g, device=cuda).to(torch.bfloat16) for heads in (8, 2, 2))
    shape = AttentionShape(0.125, window, softcap)
    other = LayerCache(cache.keys.clone(), cache.values.clone())
    expected = REFERENCE.attention(q, k, v, other, batch, shape)
    torch.testing.assert_close(backend.attention(q, k, v, cache, batch, shape), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_flat_driving_equals_generate(family: str, tmp_path: Path) -> None:
    folder = str(save_tiny(family, tmp_path))
    oracle = dequantized_model(folder, attention="eager")
    oracle.generation_config.eos_token_id = None
    prompt = [5, 17, 99, 3, 42, 8, 77]
    ids = torch.tensor([prompt])
    out = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    model = load_model(folder, device="cuda", dtype="fp32").model
    assert greedy_flat(model, [prompt, [7, 7]], 12)[0] == out[0, len(prompt) :].tolist()


async def test_a_mixed_batch_over_grpc(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    names = [save_adapter(root / f"a{i}", rank=rank, seed=i).name for i, rank in enumerate((1, 8, 64))]
    async with serving(save_model(tmp_path / "model"), root, device="cuda") as stack:
        for name in names:
            await stack.admin.load(name)
        baseline = stack.counts()
        cases = [(name, prompt) for name in ("", *names) for prompt in ("Hello", "The sea is")]
        alone = [(await stack.client.generate(p, adapter=a, max_new_tokens=16)).text for a, p in cases]
        together = await asyncio.gather(*(stack.client.generate(p, adapter=a, max_new_tokens=16) for a, p in cases))
        assert [r.text for r in together] == alone
        await stack.settle(baseline)

"""What an adapter takes is its own size: a small one beside a large one costs no more than alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from loramux.lora.adapter import Adapter
from safetensors.torch import load_file, save_file

from tests.server.stack import TARGETS, save_adapter, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
LAYERS = 3


def expected_bytes(rank: int, targets: Iterable[str]) -> int:
    """bf16: two bytes a parameter; every A and every B takes whole lines of 64 bytes."""
    parameters = [size for name in targets for size in (rank * TARGETS[name][0], TARGETS[name][1] * rank)]
    return LAYERS * sum((2 * size + 63) // 64 * 64 for size in parameters)


def save_small(folder: Path) -> None:
    """Rank 3 on q_proj alone."""
    save_adapter(folder, rank=3, layers=LAYERS, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "q_proj" in key}, file)


async def test_a_small_adapter_beside_a_large_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    save_small(tmp_path / "small")
    save_adapter(tmp_path / "large", rank=64, layers=LAYERS)
    expected = {"small": expected_bytes(3, ["self_attn.q_proj"]), "large": expected_bytes(64, TARGETS)}
    assert expected["large"] > 100 * expected["small"]
    # Room for exactly both: one byte of padding that the books do not show would be refused.
    async with serving(folders[0], tmp_path, dtype="bf16", adapter_memory=sum(expected.values())) as stack:
        for name, nbytes in expected.items():
            loaded = await stack.admin.load(name)
            assert (loaded.device_bytes, loaded.size_bytes) == (nbytes, nbytes)
        answers = [await stack.client.generate("Hello", adapter=n, max_new_tokens=4) for n in expected]
        assert [len(a.completions) for a in answers] == [1, 1]

        listed = await stack.admin.list()
        assert {a.name: a.device_bytes for a in listed.adapters} == expected
        assert listed.device_bytes == sum(expected.values())
        metrics = (await asyncio.to_thread(stack.application.server.metrics.render)).decode().splitlines()
        (told,) = [line.split()[-1] for line in metrics if line.startswith("loramux_adapter_bytes")]
        assert float(told) == sum(expected.values())

        storages = set()
        for name, nbytes in expected.items():
            entry = stack.application.adapters.registry.get(name)
            adapter = entry.loaded
            assert isinstance(adapter, Adapter)
            assert adapter.buffer.dtype == torch.bfloat16
            assert adapter.buffer.numel() * adapter.buffer.element_size() == entry.nbytes == nbytes
            assert adapter.buffer.untyped_storage().nbytes() == nbytes
            for weights in adapter.weights.values():  # nothing of it is elsewhere
                for tensor in (weights.a, weights.b):
                    assert tensor.untyped_storage().data_ptr() == adapter.buffer.untyped_storage().data_ptr()
            storages.add(adapter.buffer.untyped_storage().data_ptr())
        assert len(storages) == 2
        for name, nbytes in expected.items():
            assert (await stack.admin.unload(name)).freed_bytes == nbytes
        assert stack.application.adapters.registry.budget.used == 0

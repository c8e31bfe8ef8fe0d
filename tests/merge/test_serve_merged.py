"""`serve --merged NAME`: that adapter as a dense model, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from loramux import checks
from loramux.config import Settings
from loramux.errors import AdapterUnavailable, StartupError
from loramux.values import StartAdapter

from tests.server.stack import save_adapter, save_model, serving

PROMPT = "what is merged answers"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("merged")
    for name, seed in (("a", 1), ("b", 2)):
        save_adapter(root / "adapters" / name, seed=seed)
    return save_model(root / "model"), root / "adapters"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
async def test_it_answers_as_the_batch_does_and_says_what_it_is(dtype: str, folders: tuple[Path, Path]) -> None:
    async with serving(*folders, dtype=dtype) as stack:
        await stack.admin.load("a")
        batched = await stack.client.generate(PROMPT, adapter="a", max_new_tokens=24)
        whole = await stack.client.model()
        assert whole.merged_adapter == ""
        assert not (await stack.admin.get("a")).merged
    async with serving(*folders, dtype=dtype, merged=StartAdapter("a")) as stack:
        result = await stack.client.generate(PROMPT, adapter="a", max_new_tokens=24)
        again = await stack.client.generate(PROMPT, mix={"a": 1.0}, max_new_tokens=24)
        if dtype == "fp32":  # in bfloat16 two roundings of a random model part ways sooner or later
            assert result.text == batched.text
        assert again.text == result.text
        assert [(u.name, u.digest) for u in result.adapters] == [("a", batched.adapters[0].digest)]
        assert (await stack.client.model()).merged_adapter == "a"
        assert (await stack.client.model()).weight_bytes > whole.weight_bytes
        (adapter,) = (await stack.admin.list()).adapters
        assert (adapter.name, adapter.merged, adapter.state, adapter.device_bytes) == ("a", True, "ready", 0)
        assert (adapter.max_rank, adapter.sites, len(adapter.target_modules)) == (4, 21, 7)


async def test_everything_else_is_refused_with_the_way_out(folders: tuple[Path, Path]) -> None:
    async with serving(*folders, merged=StartAdapter("a")) as stack:
        for asked, why in (
            ({"adapter": "b"}, "cannot answer for 'b'"),
            ({"adapter": "nobody"}, "cannot answer for 'nobody'"),
            ({}, "the base model alone is not here"),
            ({"mix": {"a": 0.5}}, "its weight is 1 and cannot be 0.5"),
            ({"mix": {"a": 1.0, "b": 0.1}}, "cannot answer for 'a' \\+ 'b'"),
        ):
            with pytest.raises(AdapterUnavailable, match=f"{why}; ask for adapter 'a'") as caught:
                await stack.client.generate(PROMPT, **asked)
            assert (caught.value.reason, caught.value.metadata["merged"]) == ("MERGED_SERVER", "a")
        for change in (stack.admin.load("b"), stack.admin.unload("a")):
            with pytest.raises(AdapterUnavailable, match="without --merged"):
                await change
        assert [a.name for a in (await stack.admin.list()).adapters] == ["a"]
        assert (await stack.client.generate(PROMPT, adapter="a", max_new_tokens=2)).usage.completion_tokens == 2


async def test_dora_and_an_adapter_from_a_hub(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """--adapter-hub counts for --merged, too."""
    cache = folders[1].parent / "cache"
    monkeypatch.setattr(checks, "cache_root", lambda: cache)
    save_adapter(cache / "hub" / f"acme--dora@{'0' * 40}", use_dora=True)
    source = f"hub:acme/dora@{'0' * 40}"
    async with serving(*folders, adapter_hub=("acme/*",)) as stack:
        await stack.admin.load("d", source)
        batched = await stack.client.generate(PROMPT, adapter="d", max_new_tokens=24)
    async with serving(*folders, adapter_hub=("acme/*",), merged=StartAdapter("d", source)) as stack:
        assert (await stack.client.generate(PROMPT, adapter="d", max_new_tokens=24)).text == batched.text


async def test_what_cannot_be_merged_ends_the_start(folders: tuple[Path, Path]) -> None:
    with pytest.raises(StartupError, match=r"--merged nobody: .*there is no folder"):
        async with serving(*folders, merged=StartAdapter("nobody")):
            pass
    save_adapter(folders[1] / "huge", lora_alpha=1e8)
    with pytest.raises(StartupError, match=r"--merged huge: .*float16 cannot hold; use --dtype bf16"):
        async with serving(*folders, dtype="fp16", merged=StartAdapter("huge")):
            pass
    with pytest.raises(StartupError, match="--merged serves one adapter"):
        Settings(merged=StartAdapter("a"), adapter=(StartAdapter("b"),))

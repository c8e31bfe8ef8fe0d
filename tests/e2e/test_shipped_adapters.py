"""The shipped adapters on the embedded model, through `loramux serve` in a process of its own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from loramux.demo import serving

from adapters.recipes.score import ADAPTER_FLOOR, BASE_CEILING, score

ROOT = Path(__file__).parent.parent.parent / "adapters"
NAMES = sorted(path.parent.name for path in ROOT.glob("*/adapter_config.json"))


def config(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((ROOT / name / "adapter_config.json").read_text())
    return found


def test_they_are_small_and_of_different_kinds() -> None:
    assert len(NAMES) >= 4
    assert sum(p.stat().st_size for n in NAMES for p in (ROOT / n).iterdir()) < 6_000_000
    configs = [config(name) for name in NAMES]
    assert any(c["use_rslora"] for c in configs)
    assert any(c["rank_pattern"] for c in configs)
    assert len({c["r"] for c in configs}) > 1
    assert len({tuple(sorted(c["target_modules"])) for c in configs}) > 1  # type: ignore[call-overload]
    for name in NAMES:
        assert (ROOT / name / "README.md").is_file(), f"{name} has no model card"
        assert "/" not in json.dumps(config(name)).replace("HuggingFaceTB/", ""), "a path of the trainer's machine"


@pytest.mark.timeout(900)
def test_they_do_their_tasks_in_a_mixed_batch_as_alone_and_the_base_does_not() -> None:
    """Fewer cases than `python -m adapters.recipes.score` runs for the README's table, with the same bounds."""
    pytest.importorskip("torch")
    with serving("smollm2", ROOT, NAMES) as ports:
        scores = asyncio.run(score(ports["public"], NAMES, cases=5))
    for s in scores:
        assert s.mixed >= ADAPTER_FLOOR, s
        assert s.base <= BASE_CEILING, s
        assert s.same == 1.0, f"{s}: a mixed batch changed an answer"

"""Settings of the whole test run, and what several rooms' tests need."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings

try:
    import torch
except ModuleNotFoundError:  # as `make check-py312` has it, where tests that need no torch are run
    torch = None

# Whether triton interprets is decided when something, anything, imports it first.
if torch is None or not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    # There each example compiles kernels, and shrinking one that fails would compile dozens.
    settings.register_profile(
        "device", derandomize=True, deadline=None, database=None, phases=(Phase.explicit, Phase.generate)
    )
    settings.load_profile("device")

# Threads that wait for each other hardly move where other programs keep all cores busy, and with tiny models they cost
# more in waiting than they compute; in servers that tests start, too, hence the variables.
os.environ.setdefault("LORAMUX_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if torch is not None:
    torch.set_num_threads(1)

# What is imported stays: no collection looks at it while tests are found, nor later.
gc.disable()

collect_ignore = ["server"] if torch is None else []  # its conftest.py needs torch
_NEED_TORCH = re.compile("No module named '(torch|transformers|bitsandbytes|triton|peft)'")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Where there is no torch, files that import it are skipped."""
    report = yield
    if torch is None and report.failed and _NEED_TORCH.search(str(report.longrepr)):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, "needs torch")
    return report


@pytest.fixture(scope="module")
def qalora_on_any_base() -> Iterator[None]:
    """PEFT computes QA-LoRA for GPTQ bases only, and those need a GPU; its own variant works on any linear layer."""
    from peft import LoraConfig
    from peft.tuners.lora import layer, variants

    plain = layer.Linear.resolve_lora_variant

    def resolve(self: layer.Linear, *, config: LoraConfig, **kwargs: Any) -> Any:
        return variants.QALoraLinearVariant() if config.use_qalora else plain(self, config=config, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.Linear, "resolve_lora_variant", resolve)
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()

"""The table of docs/gpu.md that says what fits on which GPU: `python -m tests.plan_table` writes it there."""

from __future__ import annotations

from pathlib import Path

from loramux.config import Settings
from loramux.model.outline import outline
from loramux.plan import Plan, plan_outline
from loramux.tables import size

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- plan: begin -->\n", "<!-- plan: end -->"
# The published config.json of meta-llama/Llama-3.2-1B, Meta-Llama-3-8B and -70B, and Qwen/Qwen3-32B.
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
MODELS = {
    "Llama-3.2-1B": "llama-3.2-1b",
    "Llama-3-8B": "llama-3-8b",
    "Qwen3-32B": "qwen3-32b",
    "Llama-3-70B": "llama-3-70b",
}
GPUS = (16, 24, 48, 80, 141)  # GiB


def plans(name: str) -> list[Plan]:
    """With the default settings, for each of `GPUS`."""
    settings = Settings()
    model = outline(str(CONFIGS / f"{MODELS[name]}.json"), max_context=settings.max_context)
    return [plan_outline(model, settings, gpu << 30, rank=16) for gpu in GPUS]


def table() -> str:
    """In Markdown."""
    head = ("", "weights", "one r=16 adapter", "in 1 GiB", "a KV token", *(f"{gpu} GiB" for gpu in GPUS))
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in MODELS:
        found = plans(name)
        first = found[0]
        cells = (name, size(first.nf4_bytes + first.dense_bytes), size(first.one_adapter_bytes), str(first.adapters),
                 size(first.kv_bytes_per_token), *map(cell, found))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(plan: Plan) -> str:
    """Tokens of the KV cache, or what is missing."""
    if plan.problem is not None:
        return f"{size(plan.missing_bytes)} missing"
    return f"{plan.kv_tokens:,}" + (" (all)" if plan.kv_bounded else "")


def written() -> str:
    """The table as the document has it."""
    return DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, begin, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + begin + table() + rest[rest.index(END) :])

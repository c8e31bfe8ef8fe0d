"""What a task is, and how its data is split. Knows no task in particular, and neither torch nor the server."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Example:
    """One user message and the exact text that answers it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task that the base cannot do.

    `draw(rng, split)` returns (input, answer). What makes the splits disjoint is the task's own affair, and its module
    says how: something that decides the answer (a surname, a table, a day, a turn of phrase) stands on one side only.
    """

    name: str
    title: str
    instruction: str
    draw: Callable[[random.Random, Split], tuple[str, str]]
    max_new_tokens: int = 64

    def examples(self, split: Split, seed: int = 0) -> Iterator[Example]:
        """An endless stream of distinct examples, the same for the same seed on every machine."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        seen: set[str] = set()
        while True:
            text, answer = self.draw(rng, split)
            if text not in seen:
                seen.add(text)
                yield Example(f"{self.instruction}\n\n{text}", answer)

    def heldout(self, count: int = 100) -> list[Example]:
        """The cases that scores are measured on: always the first `count` of the same stream."""
        stream = self.examples("heldout")
        return [next(stream) for _ in range(count)]


def side(value: str) -> Split:
    """The split that owns `value`: one value in five is never seen in training. Stable across runs and machines."""
    return "heldout" if zlib.crc32(value.encode()) % 5 == 0 else "train"


def owned(values: Sequence[str], split: Split) -> list[str]:
    """Those of `values` that belong to `split`."""
    return [value for value in values if side(value) == split]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())

"""What the benchmark asks of a peer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

from loadtest.cells import Cell


class Measured(NamedTuple):
    """One run of one cell: output (or prompt) tokens per second."""

    cell: str
    rate: float


class PeerUnavailable(Exception):
    """The peer cannot be had or does not run here; the text says why."""


class Peer(Protocol):
    """Another program that does the same work: which cells it can do, and how often each is measured."""

    @property
    def name(self) -> str:
        """What tables and lines of JSON call it."""

    @property
    def cells(self) -> Sequence[Cell]:
        """The cells that it can do."""

    @property
    def runs(self) -> int:
        """How often each is measured."""

    def measure(self, seed: int) -> Generator[Measured]:
        """Yield every run as it ends; run i has the prompts of `seed` + i. What was started ends with the generator.

        Raises PeerUnavailable; what it yielded before stands.
        """

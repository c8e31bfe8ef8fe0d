"""One sequence of a request while the engine has it. Imports no torch."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loramux.engine.detokenizer import TextStream
from loramux.engine.request import FinishReason
from loramux.engine.stop_strings import StopScanner

if TYPE_CHECKING:
    from loramux.engine.group import Group


class Status(enum.Enum):
    """Where a sequence stands with the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Token ids and what has become of them.

    tokens    int64: the prompt, then the output
    computed  the first `computed` tokens have their keys and values in `blocks`
    blocks    int32: KV block ids in order; written by KVCache only
    keys      prefix-cache keys of the full blocks, as far as needed; always valid, since tokens only grow
    committed the first `committed` blocks are full and offered to others
    end       the sequence has its full length with this many tokens
    """

    group: Group
    index: int
    tokens: array[int]
    end: int
    text: TextStream
    scanner: StopScanner
    computed: int = 0
    committed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    status: Status = Status.WAITING

    @property
    def rank(self) -> tuple[float, int, int]:
        """Its place in the order of service; smaller is sooner, and it never changes."""
        return (*self.group.rank, self.index)

    @property
    def pending(self) -> int:
        """Known tokens that are not computed yet; at least 1 until it is finished."""
        return len(self.tokens) - self.computed

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.group.request.prompt_ids)

    def accept(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Append a generated token; return the text that is certain now, and why the sequence ends, if so.

        min_new_tokens tokens come before the one that may end the sequence by a stop token or string; a stop string
        may begin before it.
        """
        self.tokens.append(token_id)
        may_stop = self.num_output > self.group.request.sampling.min_new_tokens
        ends = may_stop and token_id in self.group.ending_ids
        text = self.scanner.feed(self.text.flush() if ends else self.text.push(token_id), may_stop=may_stop)
        if self.text.skips(token_id):
            text += self.scanner.feed_special(token_id, may_stop=may_stop)
        if not ends and not self.scanner.found and len(self.tokens) < self.end:
            return text, None
        text += self.scanner.feed(self.text.flush(), may_stop=may_stop) + self.scanner.flush()
        return text, FinishReason.STOP if ends or self.scanner.found else FinishReason.LENGTH

"""A model without arithmetic, but with a real KV cache; a byte tokenizer; adapters; an engine with its own clock.

FakeModel stores what it is given at `slots` and reads its context back through `block_tables`: the logits are a hash
of the tokens and adapters found there. So a wrong table, a wrong position, a prefix of another adapter or a block
that was freed too early gives other text than `expected`, which never saw a block.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from loramux.engine.engine import Engine
from loramux.engine.request import AdapterUse, Delta, Event, Request, RequestFailed, SamplingParams, SequenceFinished
from loramux.engine.settings import EngineSettings
from loramux.errors import LoramuxError
from loramux.model.inputs import ModelInputs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

EOS = 256
VOCAB = 260


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; 256 is a special <eos>, so any sampled bytes are possible, valid UTF-8 or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {byte: char for char, byte in _byte_of().items()}
    assert len(alphabet) == 256
    tokenizer = Tokenizer(models.BPE(vocab={by_byte[i]: i for i in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


def _byte_of() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass(eq=False)
class FakeAdapter:
    """An AdapterHandle. `weights` maps site 0 to a number that takes the place of the factors."""

    name: str
    uid: str
    digest: str = "sha256:0"
    weights: Mapping[int, Any] | None = None
    error: LoramuxError | None = None
    mixable: bool = True

    def load(self) -> FakeAdapter:
        self.weights = {0: self.uid}
        return self


def adapter(name: str, uid: str | None = None) -> FakeAdapter:
    """A loaded adapter."""
    return FakeAdapter(name, uid or f"{name}-1").load()


@dataclass(eq=False)
class FakeModel:
    """See the module's docstring. `steps` keeps (rows, tokens) of each step.

    `delay` is the least that a step takes, in seconds: a request of N tokens then lasts N times that on any machine.
    """

    num_kv_blocks: int = 64
    block_size: int = 4
    max_context: int = 256
    vocab_size: int = VOCAB
    eos_token_ids: frozenset[int] = frozenset({EOS})
    steps: list[tuple[int, int]] = field(default_factory=list)
    delay: float = 0.0
    fail_steps: int = 0
    fault: Exception = field(default_factory=lambda: RuntimeError("seeded fault: a secret of the internals"))
    asynchronous: bool = False
    compilations: int = 0
    poison: int | None = None  # a sequence whose last token is this one gets NaN logits

    def __post_init__(self) -> None:
        self.store: dict[int, tuple[int, int, str]] = {}

    def forward(self, inputs: ModelInputs) -> Tensor:
        if self.fail_steps:
            self.fail_steps -= 1
            raise self.fault
        time.sleep(self.delay)
        tokens, positions, slots = (t.tolist() for t in (inputs.token_ids, inputs.positions, inputs.slots))
        assert len(set(slots)) == len(slots), "two rows write the same slot"
        for i, (token, position, slot) in enumerate(zip(tokens, positions, slots, strict=True)):
            self.store[slot] = (token, position, _adapters_of_row(inputs, i))
        starts, contexts = inputs.query_starts.tolist(), inputs.context_lens.tolist()
        self.steps.append((len(contexts), len(tokens)))
        wanted = set(inputs.logits_rows.tolist())
        logits = []
        for s, length in enumerate(contexts):
            table = inputs.block_tables[s].tolist()
            context = [
                self.store[table[p // self.block_size] * self.block_size + p % self.block_size] for p in range(length)
            ]
            assert [position for _, position, _ in context] == list(range(length)), "a block of another place"
            assert starts[s + 1] - starts[s] <= length
            if starts[s + 1] - 1 in wanted:
                row = _logits([(token, who) for token, _, who in context])
                logits.append(row * np.nan if context[-1][0] == self.poison else row)
        return torch.from_numpy(np.stack(logits)) if logits else torch.zeros(0, VOCAB)


def _adapters_of_row(inputs: ModelInputs, row: int) -> str:
    return repr([(s.weight, s.sites[0]) for s in inputs.segments if s.start <= row < s.stop])


def _logits(context: Sequence[tuple[int, str]]) -> np.ndarray:
    digest = hashlib.blake2b(repr(context).encode(), digest_size=8).digest()
    random = np.random.Generator(np.random.Philox(int.from_bytes(digest, "big")))
    return random.standard_normal(VOCAB, dtype=np.float32)


def expected(prompt: Sequence[int], uses: Sequence[AdapterUse] = (), count: int = 8) -> list[int]:
    """The greedy answer, worked out without an engine; end tokens are passed over."""
    who = repr([(use.weight, use.handle.uid) for use in uses])
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(_logits([(token, who) for token in tokens]).argmax()))
    return tokens[len(prompt) :]


def request(
    prompt: Sequence[int] | str,
    *adapters: FakeAdapter | AdapterUse,
    request_id: str = "r",
    arrival: float = 0.0,
    deadline: float | None = None,
    priority: int = 0,
    cache_salt: str = "",
    **sampling: Any,
) -> Request:
    """Eight greedy tokens past any end token, unless `sampling` says otherwise."""
    knobs = {"max_new_tokens": 8, "ignore_eos": True} | sampling
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt.encode()) if isinstance(prompt, str) else tuple(prompt),
        sampling=SamplingParams(**knobs),
        adapters=tuple(a if isinstance(a, AdapterUse) else AdapterUse(a) for a in adapters),
        arrival=arrival,
        deadline=deadline,
        priority=priority,
        cache_salt=cache_salt,
    )


class Bench:
    """An Engine with a clock that stands still unless told, and a book of all that it says."""

    def __init__(self, model: FakeModel | None = None, **settings: Any) -> None:
        self.now = 1000.0
        self.model = model or FakeModel()
        self.finished: list[Request] = []
        knobs = {"max_batch_rows": 8, "max_batch_tokens": 32} | settings
        self.engine = Engine(
            self.model,
            byte_tokenizer(),
            EngineSettings(**knobs),
            on_finish=self.finished.append,
            clock=lambda: self.now,
        )
        self.events: dict[Request, list[Event]] = {}

    def submit(self, *requests: Request) -> None:
        for r in requests:
            self.engine.check(r)
            self.events[r] = []
            self.engine.submit(r, self.events[r].append)

    def run(self, limit: int = 2000) -> None:
        """Step until there is nothing to do; the books are checked after every step."""
        for _ in range(limit):
            busy = self.engine.step()
            self.engine.check_books()
            if not busy:
                return
        raise AssertionError(f"still busy after {limit} steps")

    def tokens(self, r: Request, index: int = 0) -> list[int]:
        deltas = [e for e in self.events[r] if isinstance(e, Delta) and e.index == index]
        return [token for delta in deltas for token in delta.token_ids]

    def text(self, r: Request, index: int = 0) -> str:
        return "".join(e.text for e in self.events[r] if isinstance(e, Delta) and e.index == index)

    def end(self, r: Request) -> SequenceFinished:
        """The last event of a request that ended well."""
        last = self.events[r][-1]
        assert isinstance(last, SequenceFinished), last
        assert last.last
        return last

    def error(self, r: Request) -> LoramuxError:
        """The error of a request that did not."""
        last = self.events[r][-1]
        assert isinstance(last, RequestFailed), last
        return last.error

    def assert_baseline(self) -> None:
        """Every request has ended exactly once, and nothing is left of any."""
        self.engine.check_books()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert sorted(map(id, self.finished)) == sorted(map(id, self.events)), "leases: once each"
        assert not self.engine.scheduler.waiting
        assert not self.engine.scheduler.running
        for events in self.events.values():
            finals = [e for e in events if isinstance(e, RequestFailed) or (isinstance(e, SequenceFinished) and e.last)]
            assert finals == events[-1:], "one last event, and nothing after it"

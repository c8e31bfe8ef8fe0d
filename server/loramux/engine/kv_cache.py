"""Who owns which KV block, and which blocks hold a prefix to share. Policy only: imports no torch.

A block is in exactly one of three states: held by sequences (reference count > 0), free and still remembered
by the prefix cache (evicted last-recently-used first), or free and empty.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from loramux.engine.sequence import Sequence

_KEY_BYTES = 32


def cache_root(uses: tuple[tuple[str, float], ...], salt: str) -> bytes:
    """The key before a sequence's first block: which adapters (uid, weight) compute it, and for whom.

    Keys are chained 256-bit digests, so that different contents never meet: not by Python's hash, not by a
    tenant who tries. The encoding is unambiguous (JSON; weights as exact hexadecimal floats).
    """
    identity = json.dumps([[[uid, float(weight).hex()] for uid, weight in uses], salt])
    return blake2b(identity.encode(), digest_size=_KEY_BYTES).digest()


class KVCache:
    """Hands out blocks. Only the engine's thread calls it."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.query_tokens = 0
        self.hit_tokens = 0
        self._references = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._remembered: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._empty) + len(self._remembered)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free

    def admit(self, seq: Sequence, headroom: int) -> bool:
        """Take the longest cached prefix (`seq.computed` tokens then) and blocks for all of the tokens.

        False, and nothing changes, unless `headroom` blocks stay free. The last token is never served from
        the cache: its logits are needed, so at least one token is computed.
        """
        hits = self._cached_prefix(seq)
        fresh = self._blocks_for(len(seq.tokens)) - len(hits)
        idle_hits = sum(self._references[block] == 0 for block in hits)
        if fresh + idle_hits + headroom > self.num_free:
            return False
        for block in hits:
            self._remembered.pop(block, None)
            self._references[block] += 1
        seq.blocks = array("i", hits)
        seq.committed = len(hits)
        seq.computed = len(hits) * self.block_size
        self.query_tokens += len(seq.tokens)
        self.hit_tokens += seq.computed
        return self.reserve(seq)

    def reserve(self, seq: Sequence) -> bool:
        """Give the sequence blocks for all its tokens. False, and nothing changes, if there are too few."""
        missing = self._blocks_for(len(seq.tokens)) - len(seq.blocks)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            seq.blocks.append(self._take())
        return True

    def commit(self, seq: Sequence) -> None:
        """Offer the full, computed blocks to later sequences. Called after the model has written them."""
        full = seq.computed // self.block_size
        if not self.prefix_caching or full <= seq.committed:
            return
        self._extend_keys(seq, full)
        for i in range(seq.committed, full):
            key, block = seq.keys[i], seq.blocks[i]
            if key not in self._block_of:  # else another sequence computed the same at the same time
                self._block_of[key] = block
                self._key_of[block] = key
        seq.committed = full

    def release(self, seq: Sequence) -> None:
        """Take the sequence's blocks back. Doing it twice is harmless."""
        for block in reversed(seq.blocks):  # ends of prefixes are forgotten before their beginnings
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._remembered[block] = None
                else:
                    self._empty.append(block)
        seq.blocks = array("i")
        seq.computed = seq.committed = 0

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the books balance; `sequences` are all that hold blocks."""
        held = Counter(block for seq in sequences for block in seq.blocks)
        for block, count in enumerate(self._references):
            assert held[block] == count, f"block {block}: {held[block]} holders, {count} references"
        free = [*self._empty, *self._remembered]
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free).isdisjoint(held), "a held block is free"
        assert len(free) + len(held) == self.num_blocks, "a block is lost"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "keys and blocks disagree"
        assert set(self._remembered) <= set(self._key_of), "a remembered block has no key"
        assert set(self._empty).isdisjoint(self._key_of), "an empty block has a key"

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._remembered.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._references[block] = 1
        return block

    def _cached_prefix(self, seq: Sequence) -> list[int]:
        if not self.prefix_caching:
            return []
        usable = (len(seq.tokens) - 1) // self.block_size
        eldest = seq.group.sequences[0]
        if not seq.keys and seq is not eldest:  # they have the prompt in common, and it may be long
            seq.keys = eldest.keys[: len(seq.group.request.prompt_ids) // self.block_size]
        self._extend_keys(seq, usable)
        hits: list[int] = []
        for key in seq.keys[:usable]:
            block = self._block_of.get(key)
            if block is None:
                break
            hits.append(block)
        return hits

    def _extend_keys(self, seq: Sequence, count: int) -> None:
        """Make the keys of the first `count` blocks: digest(key of the block before, token ids as int64)."""
        for i in range(len(seq.keys), count):
            before = seq.keys[-1] if seq.keys else seq.group.root
            tokens = seq.tokens[i * self.block_size : (i + 1) * self.block_size]
            seq.keys.append(blake2b(before + tokens.tobytes(), digest_size=_KEY_BYTES).digest())

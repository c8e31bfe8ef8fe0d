"""Token ids → text, piece by piece: valid UTF-8 at every moment, and the pieces add up to the whole.

The text starts at the first output token, without the prompt's context: what `tokenizer.decode(output_ids,
skip_special_tokens=True)` gives. (A sentencepiece tokenizer thus drops the first word's leading space, as
there.)

Why not `tokenizers.decoders.DecodeStream`: it cannot be flushed, so an answer that ends inside a character
would lose its last bytes, and it raises on malformed byte-fallback sequences, which a sampled model does
produce. Knows nothing of stop conditions.
"""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 32


class Detokenizer:
    """Shared by all sequences; holds the tokenizer and what is worth knowing about it once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer`: the Hugging Face fast tokenizer's `backend_tokenizer`."""
        self.tokenizer = tokenizer
        special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special)
        self._special = {content: i for i, content in special.items() if content}
        self._special_lengths = sorted({len(content) for content in self._special}, reverse=True)
        self._special_starts = frozenset(content[0] for content in self._special)
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def open(self) -> TextStream:
        """A stream for a new sequence."""
        return TextStream(self)

    def split(self, text: str) -> list[str | int]:
        """The characters of `text`, and the ids of the special tokens that it names, of several the longest."""
        symbols: list[str | int] = []
        at = 0
        while at < len(text):
            lengths = self._special_lengths if text[at] in self._special_starts else ()
            token = next((t for length in lengths if (t := text[at : at + length]) in self._special), None)
            symbols.append(text[at] if token is None else self._special[token])
            at += 1 if token is None else len(token)
        return symbols

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, which hold no special ones."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _token_text(self, token_id: int) -> str:
        """One token alone, special ones by name; bytes that are no UTF-8 by themselves become U+FFFD."""
        return self.decode([token_id])


class TextStream:
    """One sequence's text so far.

    `_ids` are the last tokens whose text is out (the decoder needs them as left context: spaces, joined
    bytes) and the tokens after them; `_sent` characters of their decoded text have been given out. Trailing
    U+FFFD are held back, since the next token may complete the character; not for more than MAX_HELD_TOKENS
    tokens, so that a sequence of pure garbage costs linear time.
    """

    __slots__ = ("_context", "_ids", "_owner", "_sent")

    def __init__(self, owner: Detokenizer) -> None:
        self._owner = owner
        self._ids: list[int] = []
        self._context = 0
        self._sent = 0

    def skips(self, token_id: int) -> bool:
        """Whether the token is a special one, which has no text."""
        return token_id in self._owner.special_ids

    def push(self, token_id: int) -> str:
        """Take the next token, return the text that is certain now. Special tokens have no text."""
        if self.skips(token_id):
            return ""
        self._ids.append(token_id)
        text = self._owner.decode(self._ids)
        certain = text.rstrip(REPLACEMENT)
        if len(certain) == len(text) or len(self._ids) - self._context > MAX_HELD_TOKENS:
            piece = text[self._sent :]
            self._rebase()
            return piece
        piece = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        return piece

    def flush(self) -> str:
        """The sequence ends here: incomplete bytes come out as U+FFFD."""
        if len(self._ids) == self._context:
            return ""
        piece = self._owner.decode(self._ids)[self._sent :]
        self._rebase()
        return piece

    def _rebase(self) -> None:
        """All text is out: the tokens since the last time become the context of the next."""
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        self._sent = len(self._owner.decode(self._ids))

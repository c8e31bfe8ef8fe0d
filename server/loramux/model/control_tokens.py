"""Tells control tokens that a text spells out from those that stand in it: what a user writes is never one.

A control token is an added token that the tokenizer marks as special, or that the chat template writes itself. Found by
the tokenizer's own search (Aho-Corasick, in Rust and without the interpreter's lock), never by regular expressions.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import models

from loramux.errors import InvalidRequest

_PRIVATE = range(0xF0000, 0xFFFFE)  # supplementary private use: characters without case, class or meaning


def control_texts(backend: tokenizers.Tokenizer, template: str, more: Iterable[str] = ()) -> list[str]:
    """The texts of the control tokens; see ControlTokens."""
    special = set(more)
    return [
        token.content
        for token in backend.get_added_tokens_decoder().values()
        if token.special or token.content in special or (token.content.strip() and token.content in template)
    ]


class ControlTokens:
    """The control tokens of a tokenizer, and a twin of it that knows them by other, unguessable names: their marks.

    Whatever text `encode` is given, a control token comes out only where its mark stands. Thread-safe.
    """

    def __init__(self, backend: tokenizers.Tokenizer, template: str, more: Iterable[str] = ()) -> None:
        """`more`: texts of tokens that are special although the tokenizer does not say so."""
        added = list(backend.get_added_tokens_decoder().values())
        self.special = frozenset(token.content for token in added if token.special) | set(more)
        self._texts = control_texts(backend, template, more)
        secret = secrets.token_hex(8)
        self._marks = {text: f"\U0010fffd{secret}.{i}\U0010fffd" for i, text in enumerate(self._texts)}
        self._prefixes = frozenset(text[:end] for text in self._texts for end in range(1, len(text)))
        self._longest = max(map(len, self._texts), default=0)
        self._finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
        self._finder.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in self._texts])
        renormalized = any(token.normalized for token in added if token.content in self._marks)
        self._normalizer = backend.normalizer if renormalized else None
        twin = _Twin.of(backend, self._marks)
        self._twin = twin if twin is not None else _Twin(_renamed(backend, self._marks))
        self._around = _around(backend)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text in which marks, and nothing else, stand for control tokens. Raises InvalidRequest if it cannot
        be written so."""
        before, after = self._around if add_special_tokens else ([], [])
        return [*before, *self._twin.encode(text), *after]

    @property
    def texts(self) -> list[str]:
        """What they are."""
        return self._texts

    def in_contents(self, contents: Sequence[str]) -> bool:
        """Whether one of them holds a control token's text, or ends with the beginning of one."""
        texts = list(contents)
        if self._normalizer is not None:
            texts += [self._normalizer.normalize_str(text) for text in contents]
        return any(self._places(texts)) or any(self._unfinished(text) for text in contents)

    def found(self, contents: Sequence[str]) -> set[str]:
        """The control tokens whose texts are in the contents."""
        return {text[a:b] for text, places in zip(contents, self._places(contents), strict=True) for a, b in places}

    def mark(self, text: str) -> str:
        """Every control token's text in `text` becomes its mark."""
        ((*places,),) = self._places([text])
        parts, done = [], 0
        for start, end in places:
            parts += [text[done:start], self._marks[text[start:end]]]
            done = end
        return "".join([*parts, text[done:]])

    def disguise(self, contents: Sequence[str], masks: dict[str, str], but: frozenset[str] = frozenset()) -> list[str]:
        """The contents with a mask for the first character of each control token's text, one that only begins at the
        end included: lengths stay, and nothing spells a control token out. Those of the tokens `but` stay as they are.
        """
        masked = []
        for text, places in zip(contents, self._places(contents), strict=True):
            starts = [start for start, end in places if text[start:end] not in but]
            starts += self._unfinished(text)
            parts, done = [], 0
            for start in starts:
                parts += [text[done:start], masks[text[start]]]
                done = start + 1
            masked.append("".join([*parts, text[done:]]))
        return masked

    def masks(self, *texts: str) -> dict[str, str]:
        """For the first character of each control token a character that is in none of the texts."""
        used = set().union(*texts)
        free = (chr(point) for point in _PRIVATE if chr(point) not in used)
        return {first: next(free) for first in sorted({text[0] for text in self._texts})}

    def _places(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """(start, end) of each control token's text in each of the texts, in characters."""
        found = self._finder.encode_batch(list(texts), add_special_tokens=False)
        return [[place for i, place in zip(e.ids, e.offsets, strict=True) if i > 0] for e in found]

    def _unfinished(self, text: str) -> list[int]:
        """Where a control token's text begins that the content's end, white space aside, cuts off."""
        end = len(text.rstrip())
        tail = text[max(0, end - self._longest) : end]
        lengths = [n for n in range(len(tail), 0, -1) if tail[-n:] in self._prefixes]
        return [end - lengths[0]] if lengths else []


@dataclass(frozen=True, slots=True)
class _Twin:
    """`ids`: what the twin's ids are in the tokenizer, as far as they differ. `control`: those that must not come."""

    tokenizer: tokenizers.Tokenizer
    ids: Mapping[int, int] = field(default_factory=dict)
    control: frozenset[int] = frozenset()

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer, marks: Mapping[str, str]) -> _Twin | None:
        """A twin with the same model object, which costs next to nothing where a copy takes seconds.

        None if the model spells control tokens out by itself (they may be pieces like others), or has ids where the
        marks would get theirs.
        """
        model = backend.model
        if not isinstance(model, models.BPE | models.WordLevel | models.WordPiece):
            return None
        vocab = backend.get_vocab(with_added_tokens=False)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer, tokenizer.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        added = sorted(backend.get_added_tokens_decoder().items())
        tokenizer.add_tokens([_called(marks.get(token.content, token.content), token) for _, token in added])
        ids: dict[Any, int] = {
            tokenizer.token_to_id(marks.get(token.content, token.content)): number for number, token in added
        }
        control = frozenset(vocab[text] for text in marks if text in vocab and text != model.unk_token)
        twin = cls(tokenizer, {mine: its for mine, its in ids.items() if mine != its}, control)
        taken = {tokenizer.token_to_id(mark) for mark in marks.values()} & set(vocab.values())
        spelled = {i for e in tokenizer.encode_batch_fast(list(marks), add_special_tokens=False) for i in e.ids}
        return None if taken or spelled & control else twin

    def encode(self, text: str) -> list[int]:
        """Ids as the tokenizer has them."""
        ids = encode(self.tokenizer, text, False)
        if not self.control.isdisjoint(ids):
            raise InvalidRequest("input", "holds a control token's text that this tokenizer cannot take as text")
        return [self.ids.get(number, number) for number in ids] if self.ids else ids


def encode(tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Ids of a text. By `encode_batch_fast`, because `encode` holds the interpreter's lock as long as it works."""
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and behind a text."""
    bare, whole = (encode(tokenizer, "a", add_special_tokens) for add_special_tokens in (False, True))
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else ([], [])


def _called(name: str, token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    """The token itself, or one by another name, that is looked for in the text as it is."""
    if name == token.content:
        return token
    return tokenizers.AddedToken(
        name, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=token.special
    )


def _renamed(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """A copy in which the tokens of these texts have other texts, and the same ids."""
    spec: dict[str, Any] = json.loads(backend.to_str())
    spec["truncation"] = spec["padding"] = None
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False, "single_word": False}
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocab.items()}
    else:  # Unigram: pieces with scores; the number is the place
        model["vocab"] = [[names.get(text, text), *rest] for text, *rest in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:  # none may lead to a control token, nor on from one
        model["merges"] = [merge for merge in model["merges"] if not _concerns(merge, names)]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _concerns(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names

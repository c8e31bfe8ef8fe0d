"""Regular expressions that come from a file, and what they match: paths of modules. Imports no torch.

Python's matcher backtracks, and holds the interpreter's lock while it does, so one hostile pattern would stop the whole
server. Patterns of which there are many are refused where their time could explode (`compile_bounded`); the one that a
target_modules or exclude_modules may be has a time limit, in a matcher that lets go of the lock (`PathPattern`).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import regex

from loramux.errors import InvalidAdapter

Value = TypeVar("Value", int, float)

_MAX_LENGTH = 512
_MAX_WORK = 1_000_000  # backtracking steps of all patterns for one name: tens of milliseconds
_NAME_LENGTH = 64  # of a module's path, for the estimate
_ESCAPED = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)  # what stands for one character
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_MAX_PATH_PATTERN = 16_384  # characters
# What the matcher with a time limit takes for an operator (fuzzy matching, POSIX classes), and Python's for characters.
_OTHER_DIALECT = re.compile(r"\{(?!\d*,?\d*\})|\[\[:")
_MATCHING_SECONDS = 5.0  # of all paths of an adapter together; patterns that people write take microseconds


@dataclass(frozen=True, slots=True)
class PatternTable(Generic[Value]):
    """Values by patterns of module paths; the first pattern that matches decides, as in PEFT."""

    rows: tuple[tuple[re.Pattern[str], Value], ...] = ()

    @classmethod
    def compile(cls, field: str, values: Mapping[str, Value]) -> PatternTable[Value]:
        """The table for the field's JSON object. Raises InvalidAdapter."""
        found = compile_bounded(field, {key: rf"(.*\.)?({key})$" for key in values})
        return cls(tuple((found[key], value) for key, value in values.items()))

    def find(self, paths: Sequence[str], default: Value) -> Value:
        """The value for the module that is known by `paths`; the first of them that a pattern matches decides."""
        return next((value for path in paths for regex, value in self.rows if regex.match(path)), default)

    def unmatched(self, modules: Sequence[Sequence[str]]) -> list[str]:
        """The patterns that match none of the modules, each known by its paths."""
        left = [regex for regex, _ in self.rows]
        for path in (path for paths in modules for path in paths):
            if not left:
                break
            left = [regex for regex in left if regex.match(path) is None]
        return [regex.pattern.removeprefix(r"(.*\.)?(").removesuffix(")$") for regex in left]


def compile_bounded(field: str, patterns: Mapping[str, str]) -> dict[str, re.Pattern[str]]:
    """The compiled values of `patterns`: what the file has → what PEFT makes of it.

    Raises InvalidAdapter for what is no regular expression, and where matching all of them with one name could take
    very long; module names need none of what makes it so.
    """
    if sum(map(_work, patterns)) > _MAX_WORK:
        raise InvalidAdapter(
            _shown(field, max(patterns, key=_work)),
            "this pattern could take very long to match; use few * + ? "
            "{ and |, and no repeated group; for example 'layers\\.[0-9]+\\.self_attn\\.(q|v)_proj'",
            reason="UNSUPPORTED_ADAPTER",
        )
    return {key: _compile(field, key, pattern) for key, pattern in patterns.items()}


class PathPattern:
    """A regular expression that has to match a whole path. For the paths of one adapter: its time is counted."""

    def __init__(self, field: str, text: str) -> None:
        """Raises InvalidAdapter for what is no regular expression."""
        if len(text) > _MAX_PATH_PATTERN:
            raise InvalidAdapter(
                field, f"has {len(text)} characters; the limit is {_MAX_PATH_PATTERN}", reason="UNSUPPORTED_ADAPTER"
            )
        if _OTHER_DIALECT.search(text):
            raise InvalidAdapter(
                _shown(field, text),
                "has a brace that is no repetition, or a class in double brackets; no path has such characters",
                reason="UNSUPPORTED_ADAPTER",
            )
        self._field = field
        self._text = text
        _compile(field, text, text)  # by Python's own rules, which are PEFT's
        try:
            self._regex = regex.compile(text)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise _no_pattern(field, text, error) from None
        self._left = _MATCHING_SECONDS

    def matches(self, path: str) -> bool:
        """Whether it matches all of `path`. Raises InvalidAdapter when its time is up."""
        started = time.monotonic()
        try:
            return self._regex.fullmatch(path, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise InvalidAdapter(
                _shown(self._field, self._text),
                "this pattern takes very long to match; repeat no group that repeats something itself, or list the "
                "modules' names instead",
                reason="UNSUPPORTED_ADAPTER",
            ) from None
        finally:
            self._left -= time.monotonic() - started


def _compile(field: str, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _no_pattern(field, key, error) from None


def _no_pattern(field: str, key: str, error: Exception) -> InvalidAdapter:
    return InvalidAdapter(_shown(field, key), f"is not a regular expression: {error}", reason="INVALID_CONFIG")


def _shown(field: str, key: str) -> str:
    return f"{field}[{key[:80]!r}]"


def _work(key: str) -> float:
    """An upper estimate of the ways in which a matcher can try `key` on one name."""
    plain = _ESCAPED.sub("x", key)
    if len(key) > _MAX_LENGTH or _REPEATED_GROUP.search(plain):
        return math.inf
    groups = plain.count("(")
    repeats = sum(map(plain.count, "*+?{")) - plain.count("(?") + 1  # one is PEFT's own `(.*\.)?`
    alternatives = (plain.count("|") / max(groups, 1) + 1) ** max(groups, 1)
    return math.comb(_NAME_LENGTH + repeats, repeats) * alternatives

"""rank_pattern and alpha_pattern: regular expressions that come from a file, and what they give.

Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from loramux.errors import InvalidAdapter

Value = TypeVar("Value", int, float)

_MAX_LENGTH = 512
_MAX_WORK = 1_000_000  # backtracking steps of all patterns for one name: tens of milliseconds
_NAME_LENGTH = 64  # of a module's path, for the estimate
_ESCAPED = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)  # what stands for one character
_REPEATED_GROUP = re.compile(r"\)[*+{]")


@dataclass(frozen=True, slots=True)
class PatternTable(Generic[Value]):
    """Values by patterns of module paths; the first pattern that matches decides, as in PEFT."""

    rows: tuple[tuple[re.Pattern[str], Value], ...] = ()

    @classmethod
    def compile(cls, field: str, values: Mapping[str, Value]) -> PatternTable[Value]:
        """The table for the field's JSON object.

        Python's matcher backtracks, and holds the interpreter's lock while it does, so one hostile pattern would stop
        the whole server. Patterns whose time could explode are refused; module names need none. Raises
        InvalidAdapter.
        """
        if sum(map(_work, values)) > _MAX_WORK:
            raise InvalidAdapter(
                _shown(field, max(values, key=_work)),
                "this pattern could take very long to match; use few * + ? "
                "{ and |, and no repeated group; for example 'layers\\.[0-9]+\\.self_attn\\.(q|v)_proj'",
                reason="UNSUPPORTED_ADAPTER",
            )
        return cls(tuple((_compile(field, key), value) for key, value in values.items()))

    def find(self, module: str, default: Value) -> Value:
        """The value for `module`, its path in the model that the adapter was trained on."""
        return next((value for regex, value in self.rows if regex.match(module)), default)


def _compile(field: str, key: str) -> re.Pattern[str]:
    """`key` as PEFT matches it with a module's path."""
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise InvalidAdapter(
            _shown(field, key), f"is not a regular expression: {error}", reason="INVALID_CONFIG"
        ) from None


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

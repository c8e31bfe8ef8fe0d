"""How a setting's text becomes a checked value. Every parser says what it allows.

A `Kind` parses what a flag, a variable or a TOML key held and returns the value, or raises ValueError whose
text completes "give …". It knows nothing of where the text came from; `config` puts that in front.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_LEAST_BARE = 1 << 20  # bytes; a smaller amount of memory without a unit is one whose unit was forgotten
_SECRET = re.compile(r"[\x21-\x7e]{8,4096}")


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """An adapter to load at start: its name, and its folder (empty: the folder `name` in the roots)."""

    name: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """An amount of memory: `bytes`, or a `fraction` of what is free on the device when the server starts."""

    bytes: int | None = None
    fraction: float = 0.0

    def resolve(self, free_bytes: int) -> int:
        """The amount in bytes, given how much is free."""
        return self.bytes if self.bytes is not None else int(self.fraction * free_bytes)


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of setting: its parser, and the word that stands for a value in help texts."""

    parse: Callable[[object], Any]
    metavar: str


def text(metavar: str) -> Kind:
    """A text that is not blank."""

    def parse(given: object) -> str:
        if not isinstance(given, str) or not given.strip():
            raise ValueError("a text that is not empty")
        return given.strip()

    return Kind(parse, metavar)


def choice(*allowed: str) -> Kind:
    """One of a few words."""

    def parse(given: object) -> str:
        if given not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return str(given)

    return Kind(parse, "|".join(allowed))


def _parse_switch(given: object) -> bool:
    if isinstance(given, bool):
        return given
    word = given.strip().lower() if isinstance(given, str) else given
    for value, words in ((True, ("on", "true", "yes", "1")), (False, ("off", "false", "no", "0"))):
        if word in words:
            return value
    raise ValueError("on or off")


def integer(metavar: str, low: int, high: int) -> Kind:
    """A whole number, low ≤ value ≤ high."""

    def parse(given: object) -> int:
        if isinstance(given, int | str) and not isinstance(given, bool):
            try:
                value = int(given)
            except ValueError:
                value = low - 1
            if low <= value <= high:
                return value
        raise ValueError(f"a whole number from {low} to {high}")

    return Kind(parse, metavar)


def seconds(low: float, high: float) -> Kind:
    """A time in seconds, low ≤ value ≤ high."""

    def parse(given: object) -> float:
        if isinstance(given, int | float | str) and not isinstance(given, bool):
            try:
                value = float(given)
            except ValueError:
                value = float("nan")
            if low <= value <= high:  # false for NaN
                return value
        raise ValueError(f"a number of seconds from {low:g} to {high:g}")

    return Kind(parse, "SECONDS")


def _parse_size(given: object, least: int = 1, least_bare: int = 0) -> int:
    match = None
    if isinstance(given, int | str) and not isinstance(given, bool):
        match = _SIZE.fullmatch(str(given).strip())
    if match is not None:
        number, unit, binary = match.groups()
        scale = (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0)
        value = int(float(number) * scale) if "." in number else int(number) * scale
        if 0 < value < least_bare and match[0] == number:
            raise ValueError(f"it a unit, such as {number}GiB: {number} alone is a number of bytes")
        if value >= least:
            return value
    raise ValueError(f"a size such as 512MiB, 1.5GB or a number of bytes, at least {least}")


def _parse_memory(given: object) -> Memory:
    if isinstance(given, Memory):
        return given
    if isinstance(given, str) and (share := _SHARE.fullmatch(given.strip())):
        if 1 <= float(share[1]) <= 95:
            return Memory(fraction=float(share[1]) / 100)
        raise ValueError("a share of the free memory from 1% to 95%, such as 40%")
    try:
        return Memory(bytes=_parse_size(given, least_bare=_LEAST_BARE))
    except ValueError as allowed:
        raise ValueError(f"{allowed}; or a share of the free memory, such as 40%") from None


def _parse_path(given: object) -> Path:
    if isinstance(given, Path):
        return given
    if not isinstance(given, str) or not given.strip():
        raise ValueError("a path")
    return Path(given.strip()).expanduser()


def _parse_start_adapter(given: object) -> StartAdapter:
    if isinstance(given, StartAdapter):
        return given
    name, equals, source = given.partition("=") if isinstance(given, str) else ("", "", "")
    if not ADAPTER_NAME.fullmatch(name) or (equals and not source):
        raise ValueError(
            "NAME or NAME=FOLDER, the name of at most 128 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return StartAdapter(name, source)


def _parse_secret(given: object) -> str:
    # It travels in an HTTP header, so nothing but visible ASCII could ever match.
    if not isinstance(given, str) or not _SECRET.fullmatch(given.strip()):
        raise ValueError("a token of 8 to 4096 visible ASCII characters without spaces")
    return given.strip()


def many(one: Kind) -> Kind:
    """A list: repeated flags, a TOML array, or one text with commas (the environment)."""

    def parse(given: object) -> tuple[Any, ...]:
        if isinstance(given, str):
            given = [item.strip() for item in given.split(",") if item.strip()]
        if not isinstance(given, list | tuple):
            raise ValueError("a list")
        return tuple(one.parse(item) for item in given)

    return Kind(parse, one.metavar)


SWITCH = Kind(_parse_switch, "on|off")
SIZE = Kind(_parse_size, "SIZE")
MEMORY_SIZE = Kind(partial(_parse_size, least_bare=_LEAST_BARE), "SIZE")
MEMORY_SIZE_OR_NONE = Kind(partial(_parse_size, least=0, least_bare=_LEAST_BARE), "SIZE")
MEMORY = Kind(_parse_memory, "SIZE|PERCENT")
FILE = Kind(_parse_path, "FILE")
FOLDER = Kind(_parse_path, "FOLDER")
START_ADAPTER = Kind(_parse_start_adapter, "NAME[=FOLDER]")
SECRET = Kind(_parse_secret, "TOKEN")

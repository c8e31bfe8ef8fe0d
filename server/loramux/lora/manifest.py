"""The adapters file: which adapters a server should have, as YAML that replicas share. Imports no torch.

    adapters:
      - name: sql                # what clients say
        source: sql/v3           # a folder under an adapter root; the name itself if left out
        digest: sha256:…         # refuse anything else; left out: whatever lies there
        pin: true                # load it now and keep it in memory; left out: load it when it is first asked for

The file says all there should be of what it manages: what was in it and is not any more is unloaded, what has another
source or digest is replaced. Adapters that were loaded by hand, or that lie under a root, are not its business unless
it names them. A name that YAML takes for a date, a number or a truth (2020-01-01, 7, on) is written in quotes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from loramux.errors import InvalidRequest, LoramuxError
from loramux.escaping import escape
from loramux.files import read_file
from loramux.lora.roots import check_name
from loramux.lora.yaml_text import Plain, read_yaml, told

_MOST_BYTES = 16 << 20
_MOST_PROBLEMS = 8
_SAID = {
    "missing": "is missing",
    "list_type": "must be a list of adapters",
    "string_type": "must be text",
    "too_long": "must be shorter: no path has more than 4096 characters",
    "bool_type": "must be true or false, without quotes",
    "string_pattern_mismatch": "must be sha256: and 64 digits of 0-9a-f",
}
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _switch(value: object) -> object:
    """What YAML takes for a truth: such a word without quotes."""
    return _SWITCHES.get(value.lower(), value) if isinstance(value, Plain) else value


def _text(value: object) -> object:
    """Others read the file, too: what is text here must be text for them."""
    if isinstance(value, Plain) and value.other_type:
        raise ValueError(f"{str(value)[:64]!r} is {value.other_type} in YAML; write it in quotes")
    return value


Text = Annotated[str, BeforeValidator(_text)]


class Declared(BaseModel):
    """One adapter of the file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    name: Text
    source: Annotated[Text, Field(max_length=4096)] = ""
    digest: Annotated[Text, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    pin: Annotated[bool, BeforeValidator(_switch)] = False


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    adapters: list[Declared] = []


def read_manifest(path: Path) -> Mapping[str, Declared]:
    """The adapters that `path` declares, by name. Takes seconds for tens of thousands; runs in a worker.

    Raises InvalidRequest that names the flag, the file, the place in it and what is wrong there.
    """
    try:
        content = read_yaml(read_file(path, _MOST_BYTES))
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise _wrong(path, f"is not YAML that is read here: {told(error)}") from None
    try:
        file = _File.model_validate(content if content is not None else {})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        shown = [_place(e["loc"]) + _said(e["type"], e["msg"], e["loc"]) for e in problems[:_MOST_PROBLEMS]]
        more = len(problems) - len(shown)
        raise _wrong(path, "; ".join(shown) + (f"; and {more} more" if more else "")) from None
    declared: dict[str, Declared] = {}
    for i, adapter in enumerate(file.adapters):
        try:
            check_name(adapter.name, field=f"adapters.{i}.name")
        except LoramuxError as error:
            raise _wrong(path, error.message) from None
        if adapter.name in declared:
            raise _wrong(path, f"adapters.{i}.name: {adapter.name!r} is there twice")
        declared[adapter.name] = adapter
    return declared


def _said(kind: str, text: str, location: tuple[int | str, ...]) -> str:
    """What pydantic found wrong, in the words of whoever writes the file."""
    known = "an adapter has name, source, digest and pin" if len(location) > 1 else "the file has one key, adapters"
    if kind == "extra_forbidden":
        return f"is no key that is known; {known}"
    if kind == "model_type":
        return f"must be a mapping; {known}"
    return _SAID.get(kind, text.removeprefix("Value error, "))


def _place(location: tuple[int | str, ...]) -> str:
    """As adapters.3.name, with what the file says escaped and cut."""
    parts = [part if len(part) <= 64 else f"{part[:64]}…" for part in (escape(str(p)) for p in location)]
    return f"{'.'.join(parts)}: " if parts else ""


def _wrong(path: Path, what: str) -> InvalidRequest:
    return InvalidRequest("--adapters-file", f"{path}: {what}", reason="INVALID_ADAPTERS_FILE")

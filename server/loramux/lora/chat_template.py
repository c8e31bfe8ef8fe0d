"""The chat template that a trainer saved beside an adapter, with the tokenizer. Imports no torch, renders nothing."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from loramux.errors import InvalidAdapter, LoramuxError
from loramux.lora.folder import AdapterFolder
from loramux.lora.snapshot import read_beside

# The first that has one counts; the last is what processors of multimodal models wrote before the first.
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
_TEMPLATE_BYTES = 1 << 20  # of the first; of the others, characters as they stand there
_CONFIG_BYTES = 8 << 20
_FIELD = re.compile(r'"chat_template"\s*:\s*')
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'  # an unclosed one, too: it is looked at once
_STRINGS = re.compile(_STRING, re.DOTALL)
# With the interpreter's lock given away between two of them, a long file halts nobody.
_PIECES = re.compile(rf'(?:[^"]*+{_STRING}){{1,512}}+|[^"]++', re.DOTALL)


def own_chat_template(folder: AdapterFolder | Path) -> str | None:
    """The template in the first of TEMPLATE_FILES that has one; None if none has.

    Raises InvalidAdapter or PathNotAllowed for a file that may not be read or is too large, and for such a template.
    """
    alone, *configs = TEMPLATE_FILES
    template = read_beside(folder, alone, _TEMPLATE_BYTES)
    if template is not None:
        return template.decode("utf-8", "replace")
    for file in configs:
        data = read_beside(folder, file, _CONFIG_BYTES)
        found = None if data is None else _in_config(data.decode("utf-8", "replace"), file)
        if found is not None:
            return found
    return None


def template_digest(folder: AdapterFolder | Path) -> str:
    """What tells one own template from another, or from what cannot be used; empty if there is none. Not part of the
    adapter's digest."""
    try:
        template = own_chat_template(folder)
    except LoramuxError as error:
        template = error.message
    return "" if template is None else hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()


def same_template(one: str | None, other: str | None) -> bool:
    """Whether they render the same, as far as that can be told without rendering them."""
    return _plain(one) == _plain(other)


def _plain(template: str | None) -> str:
    return (template or "").replace("\r\n", "\n").strip()


def _in_config(text: str, file: str) -> str | None:
    """The template alone: such a file may have a megabyte of added tokens, too much to parse under the interpreter's
    lock."""
    start = _place(text)
    if start is None:
        return None
    string = _STRINGS.match(text, start)
    if string is not None and len(string[0]) > _TEMPLATE_BYTES:
        raise _too_large(file, f"has a chat template of {len(string[0])} characters; the limit is {_TEMPLATE_BYTES}")
    value = text[start : start + _TEMPLATE_BYTES] if string is None else string[0]
    try:
        found, _ = json.JSONDecoder().raw_decode(value)
        if string is not None:
            return str(found)
        return next((str(t["template"]) for t in found if t["name"] == "default"), None)
    except ValueError:
        if string is None and len(value) == _TEMPLATE_BYTES:
            raise _too_large(file, f"has chat templates that do not end within {_TEMPLATE_BYTES} characters") from None
        return None
    except (LookupError, TypeError, RecursionError):
        return None


def _place(text: str) -> int | None:
    """Where the value of the outermost object's field begins: the last one's, as for all readers of JSON."""
    depth = looked = 0
    place = None
    for field in _FIELD.finditer(text):
        depth += sum(_opened(piece[0]) for piece in _PIECES.finditer(text, looked, field.start()))
        looked = field.start()
        if depth == 1:
            place = field.end()
    return place


def _opened(piece: str) -> int:
    """How many more objects and lists begin in a piece of JSON than end."""
    plain = _STRINGS.sub("", piece)
    return sum(map(plain.count, "{[")) - sum(map(plain.count, "}]"))


def _too_large(file: str, what: str) -> InvalidAdapter:
    return InvalidAdapter(file, what, reason="ADAPTER_TOO_LARGE", metadata={"limit": _TEMPLATE_BYTES})

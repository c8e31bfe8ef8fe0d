"""The chat template that a trainer saved beside an adapter, with the tokenizer. Imports no torch, renders nothing."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from loramux.lora.folder import AdapterFolder
from loramux.lora.snapshot import read_beside

# The first that has one counts; the last is what processors of multimodal models wrote before the first.
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
_TEMPLATE_BYTES = 1 << 20
_CONFIG_BYTES = 8 << 20
_LISTED = 256 << 10  # characters of a list of templates
_FIELD = re.compile(r'"chat_template"\s*:\s*')


def own_chat_template(folder: AdapterFolder | Path) -> str | None:
    """The template in the first of TEMPLATE_FILES that has one; None if there is none to be read."""
    alone, *configs = TEMPLATE_FILES
    template = read_beside(folder, alone, _TEMPLATE_BYTES)
    if template is not None:
        return template.decode("utf-8", "replace")
    found = (read_beside(folder, file, _CONFIG_BYTES) for file in configs)
    named = (_in_config(data.decode("utf-8", "replace")) for data in found if data is not None)
    return next((template for template in named if template is not None), None)


def template_digest(folder: AdapterFolder | Path) -> str:
    """What tells one own template from another; empty if there is none. Not part of the adapter's digest."""
    template = own_chat_template(folder)
    return "" if template is None else hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()


def same_template(one: str | None, other: str | None) -> bool:
    """Whether they render the same, as far as that can be told without rendering them."""
    return _plain(one) == _plain(other)


def _plain(template: str | None) -> str:
    return (template or "").replace("\r\n", "\n").strip()


def _in_config(text: str) -> str | None:
    """The template alone: such a file may have a megabyte of added tokens, too much to parse under the interpreter's
    lock."""
    field = _FIELD.search(text)
    try:
        if field is None:
            return None
        decoder = json.JSONDecoder()
        if text[field.end()] == '"':
            return str(decoder.raw_decode(text, field.end())[0])
        named, _ = decoder.raw_decode(text[field.end() : field.end() + _LISTED])
        return next((str(t["template"]) for t in named if t["name"] == "default"), None)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None

"""The chat template that a trainer saved beside an adapter, with the tokenizer. Imports no torch, renders nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

from loramux.lora.folder import AdapterFolder
from loramux.lora.snapshot import read_beside

_TEMPLATE_BYTES = 1 << 20
_CONFIG_BYTES = 8 << 20
_LISTED = 256 << 10  # characters of a list of templates
_FIELD = re.compile(r'"chat_template"\s*:\s*')


def own_chat_template(folder: AdapterFolder | Path) -> str | None:
    """The template in chat_template.jinja, or else in tokenizer_config.json; None if there is none to be read."""
    template = read_beside(folder, "chat_template.jinja", _TEMPLATE_BYTES)
    if template is not None:
        return template.decode("utf-8", "replace")
    config = read_beside(folder, "tokenizer_config.json", _CONFIG_BYTES)
    return None if config is None else _in_tokenizer_config(config.decode("utf-8", "replace"))


def same_template(one: str | None, other: str | None) -> bool:
    """Whether they render the same, as far as that can be told without rendering them."""
    return _plain(one) == _plain(other)


def _plain(template: str | None) -> str:
    return (template or "").replace("\r\n", "\n").strip()


def _in_tokenizer_config(text: str) -> str | None:
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

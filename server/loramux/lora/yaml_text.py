"""YAML as mappings, lists and text, in bounded memory and without surprises. Imports no torch.

YAML's own types turn `on` into a truth, `2020-01-01` into a date and `0x1f` into a number, and some of them cannot be
made at all (2020-99-99). Here every scalar stays the text that stands there; who asks for it knows what it means, and
can ask what another reader would take it for. There are no tags, no aliases, no second document and no two keys of one
name.
"""

from __future__ import annotations

from typing import Any

import yaml

from loramux.escaping import escape

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML was built with it
_MOST_NODES = 1_000_000
_MOST_DEPTH = 16
_RESOLVERS: Any = yaml.SafeLoader.yaml_implicit_resolvers  # first character → tags and patterns
_TYPES = {
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:timestamp": "a date",
}
_NULLS = ("", "~", "null", "Null", "NULL")


class Plain(str):
    """Text that stands there without quotes."""

    __slots__ = ()

    @property
    def other_type(self) -> str:
        """What YAML takes it for if not for text, such as "a date"; else empty."""
        found = (tag for tag, pattern in _RESOLVERS.get(self[:1], ()) if pattern.match(self))
        return _TYPES.get(next(found, ""), "")


def read_yaml(content: bytes) -> object:
    """Dicts, lists and str of the one document; None for an empty one. Keys without a value are left out.

    Raises ValueError that says what is wrong and where.
    """
    root: list[Any] = []
    stack: list[tuple[Any, list[str]]] = [(root, [])]  # what is open, and its key that waits for a value
    nodes = 0
    for event in _events(content):
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.DocumentStartEvent) and root:
            raise ValueError(f"{where}: a second document; one is read")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{where}: the alias *{event.anchor}; aliases are not read, write out what it stands for")
        if isinstance(event, yaml.CollectionEndEvent):
            stack.pop()
        if not isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            continue
        if event.tag not in (None, "!"):
            raise ValueError(f"{where}: the tag {event.tag}; tags are not read, all values are text")
        nodes += 1
        if len(stack) > _MOST_DEPTH:
            raise ValueError(f"{where}: nested deeper than {_MOST_DEPTH}")
        if nodes > _MOST_NODES:
            raise ValueError(f"{where}: more than {_MOST_NODES} values")
        value = _value(event)
        _add(stack[-1], value, where)
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append((value, []))
    return root[0] if root else None


def _events(content: bytes) -> Any:
    try:
        yield from yaml.parse(content, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (OverflowError, RecursionError, UnicodeError) as error:  # what the readers themselves stumble over
        raise ValueError(f"it cannot be read: {error}") from None


def _value(event: Any) -> Any:
    if isinstance(event, yaml.MappingStartEvent):
        return {}
    if isinstance(event, yaml.SequenceStartEvent):
        return []
    if not event.implicit[0]:  # in quotes, or a block
        return event.value
    return None if event.value in _NULLS else Plain(event.value)


def _add(opened: tuple[Any, list[str]], value: Any, where: str) -> None:
    """Put a value into the collection that is open, or make it the key that waits for one."""
    collection, waiting = opened
    if isinstance(collection, list):
        collection.append(value)
    elif waiting:
        key = waiting.pop()
        if value is not None:
            collection[key] = value
        else:
            del collection[key]
    else:
        if not isinstance(value, str):
            raise ValueError(f"{where}: a key that is not text")
        if value in collection:
            raise ValueError(f"{where}: the key {value[:64]!r} is there twice")
        collection[str(value)] = None  # so that a second one is seen, whatever this one's value is
        waiting.append(str(value))


def told(error: ValueError) -> str:
    """The error in one bounded line."""
    text = escape(str(error))
    return text if len(text) <= 300 else text[:300] + "…"

"""What the fuzz targets send: damaged bytes, JSON values, and messages of any type filled with extreme values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

TEXTS = (
    "",
    "x",
    "Hello",
    "\x00",
    "\x1b[31m",
    "[/bold]",
    "../..",
    "<|im_end|>",
    "\u202e",
    "é" * 200,
    "a " * 700,
    "{{ x }}",
)
NUMBERS = (0, 1, -1, 2, 255, 256, 257, 1 << 31, (1 << 31) - 1, -(1 << 31), (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
REALS = (
    0.0,
    -0.0,
    1.0,
    0.5,
    -1.0,
    1e-45,
    1e-320,
    1e38,
    3.5e38,
    1e39,
    -1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
)

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS + REALS) | st.sampled_from(TEXTS) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: Callable[[st.SearchStrategy[Any]], Any], content: bytes) -> bytes:
    """`content` after one to five damages: bytes changed, cut off, put in or moved."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.binary(max_size=8))
        match draw(st.sampled_from(("change", "cut", "insert", "repeat", "remove"))):
            case "change":
                data[at : at + len(piece)] = piece
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = piece
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))] * draw(st.integers(1, 8))
            case "remove":
                del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def messages(draw: Callable[[st.SearchStrategy[Any]], Any], kind: Descriptor, known: Mapping[str, Any]) -> Message:
    """A message of any type, each field there or not. `known`: by a field's name, a strategy in place of extremes."""
    message = GetMessageClass(kind)()
    for field in kind.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(draw, message, field)
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_values(field, known), max_size=4)))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(_values(field, known)))
        else:
            setattr(message, field.name, draw(_values(field, known)))
    return message


def _fill_map(draw: Callable[[st.SearchStrategy[Any]], Any], message: Message, field: FieldDescriptor) -> None:
    assert field.message_type is not None
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    for k, v in draw(st.dictionaries(_values(key, {}), _values(value, {}), max_size=3)).items():
        getattr(message, field.name)[k] = v


def _values(field: FieldDescriptor, known: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    if field.name in known:
        return known[field.name]
    if field.message_type is not None:
        return messages(field.message_type, known)
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values] + [99])
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return st.sampled_from(TEXTS) | st.text(max_size=30)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return st.sampled_from(REALS) | st.floats(width=32)
        case _:
            low, high = _RANGES[field.cpp_type]
            return st.sampled_from([n for n in NUMBERS if low <= n <= high]) | st.integers(low, high)


_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}

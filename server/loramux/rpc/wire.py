"""Counts what a serialized message holds, without parsing it: protobuf's own parse of four megabytes of empty turns
takes a quarter of a second and a hundred megabytes, on the event loop and under the interpreter's lock.

The scan ends at the first field that is too often there, so its work is bounded by what is allowed, not by what was
sent. It refuses nothing else: bytes that are no message are left to protobuf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from loramux.errors import InvalidRequest

SCANNED_FROM = 16 << 10  # bytes; protobuf parses less than that in a millisecond, whatever it is
_OTHER_FIELDS = 8192  # that may be there beside the items that take fields: unknown ones, numbers that are not packed
_LOOKED_AT = 64  # fields, until a text is found; protobuf writes them in the order of their numbers
_DELIMITED = 2  # the wire type of what has a length
_CONTINUED = bytes(range(128, 256))
_LENGTH_DELIMITED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)


@dataclass(frozen=True, slots=True)
class Bound:
    """At most `most` items in a repeated field. `name` is its path in errors, `what` are its items in plain words.

    `fields` is how many fields an item takes where it is written: a turn and what it holds; packed numbers take none.
    """

    name: str
    most: int
    what: str
    reason: str | None = None
    fields: int = 1

    def check(self, given: int) -> None:
        """Raise InvalidRequest if there are more."""
        if given > self.most:
            raise InvalidRequest(
                self.name,
                f"has {given} {self.what}; at most {self.most} are allowed",
                reason=self.reason,
                metadata={"limit": self.most, "given": given},
            )


Bounds = Mapping[str, Bound]  # by the field's full name, e.g. "loramux.v1.Chat.messages"


def check_counts(raw: bytes, message: Descriptor, bounds: Bounds) -> None:
    """Raise InvalidRequest if `raw`, a serialized `message`, holds more of something than is allowed."""
    _Scan(raw, bounds).message(0, len(raw), message)


def find_text(raw: bytes, message: Descriptor, *path: str, most_bytes: int) -> str:
    """The beginning of a text in `raw`, a serialized `message` that is not parsed: of the field at the end of `path`.

    "" if the message has no such field, or its text is not among the first fields.
    """
    at, end = 0, len(raw)
    inner: Descriptor | None = message
    for name in path:
        field = inner.fields_by_name.get(name) if inner is not None else None
        places = (
            (start, stop)
            for number, kind, start, stop in islice(_fields(raw, at, end), _LOOKED_AT)
            if field is not None and number == field.number and kind == _DELIMITED
        )
        at, end = next(places, (0, 0))
        inner = field.message_type if field is not None else None
    return raw[at : min(end, at + most_bytes)].decode("utf-8", "ignore")


class _Scan:
    def __init__(self, raw: bytes, bounds: Bounds) -> None:
        self._raw = raw
        self._bounds = bounds
        self._counts: Counter[str] = Counter()
        self._most_fields = _OTHER_FIELDS + sum(bound.most * bound.fields for bound in bounds.values())
        self._fields = 0

    def message(self, at: int, end: int, message: Descriptor) -> None:
        """Count what lies between two places. Ends early where the bytes are no message."""
        for number, wire_type, start, stop in _fields(self._raw, at, end):
            self._one_more()
            field = message.fields_by_number.get(number)
            if wire_type == _DELIMITED:
                self._field(field, start, stop)
            elif field is not None and field.full_name in self._bounds:
                self._add(field, 1)  # a number that is not packed

    def _field(self, field: FieldDescriptor | None, start: int, end: int) -> None:
        if field is None:
            return
        if field.full_name in self._bounds:
            packed = field.type not in _LENGTH_DELIMITED
            self._add(field, _numbers(self._raw[start:end]) if packed else 1)
        if field.message_type is not None:
            self.message(start, end, field.message_type)

    def _add(self, field: FieldDescriptor, items: int) -> None:
        self._counts[field.full_name] += items
        self._bounds[field.full_name].check(self._counts[field.full_name])

    def _one_more(self) -> None:
        self._fields += 1
        if self._fields > self._most_fields:
            raise InvalidRequest(
                "request",
                f"the message has more than {self._most_fields} fields, repeated and unknown ones included",
                reason="TOO_MANY_FIELDS",
                metadata={"limit": self._most_fields},
            )


def _fields(raw: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, start, stop) of each field between two places; start and stop are those of its content, if
    that has a length. Ends early where the bytes are no message."""
    while at < end:
        tag, at = _varint(raw, at, end)
        number, wire_type = tag >> 3, tag & 7
        start = at
        if wire_type == _DELIMITED:
            size, start = _varint(raw, at, end)
            at = start + size
            if at > end:
                return
        elif wire_type == 0:
            _, at = _varint(raw, at, end)
        else:
            at += {1: 8, 5: 4}.get(wire_type, 0)
        yield number, wire_type, start, at


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at a place, and the place behind it; a number that does not end goes to the end."""
    value = shift = 0
    while at < end and shift < 70:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    return 0, end


def _numbers(packed: bytes) -> int:
    """How many varints lie in these bytes: each has one byte without its highest bit."""
    return len(packed.translate(None, _CONTINUED))

"""Counts what a serialized message holds, without parsing it: protobuf's own parse of four megabytes of empty turns
takes a quarter of a second and a hundred megabytes, on the event loop and under the interpreter's lock.

The scan ends at the first field that is too often there, so its work is bounded by what is allowed, not by what was
sent. It refuses nothing else: bytes that are no message are left to protobuf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from loramux.errors import InvalidRequest

SCANNED_FROM = 16 << 10  # bytes; protobuf parses less than that in a millisecond, whatever it is
_OTHER_FIELDS = 8192  # that may be there beside the items that take fields: unknown ones, numbers that are not packed
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


class _Scan:
    def __init__(self, raw: bytes, bounds: Bounds) -> None:
        self._raw = raw
        self._bounds = bounds
        self._counts: Counter[str] = Counter()
        self._most_fields = _OTHER_FIELDS + sum(bound.most * bound.fields for bound in bounds.values())
        self._fields = 0

    def message(self, at: int, end: int, message: Descriptor) -> None:
        """Count what lies between two places. Ends early where the bytes are no message."""
        while at < end:
            self._one_more()
            tag, at = self._varint(at, end)
            wire_type = tag & 7
            if wire_type == 2:
                size, at = self._varint(at, end)
                if at + size > end:
                    return
                self._field(message.fields_by_number.get(tag >> 3), at, at + size)
                at += size
                continue
            field = message.fields_by_number.get(tag >> 3)
            if field is not None and field.full_name in self._bounds:
                self._add(field, 1)  # a number that is not packed
            if wire_type == 0:
                _, at = self._varint(at, end)
            else:
                at += {1: 8, 5: 4}.get(wire_type, 0)

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

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at a place, and the place behind it; a number that does not end goes to the end."""
        value = shift = 0
        while at < end and shift < 70:
            byte = self._raw[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
            shift += 7
        return 0, end


def _numbers(packed: bytes) -> int:
    """How many varints lie in these bytes: each has one byte without its highest bit."""
    return len(packed.translate(None, _CONTINUED))

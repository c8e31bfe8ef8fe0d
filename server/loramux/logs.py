"""How the server logs: one handler on standard error, for our own lines and those of every library.

`configure` is called once, by the command line. Whatever a line holds (a caller's id, a file's name, an exception's
text) reaches it escaped: no message begins a second line, moves the cursor or turns the reading direction. Tracebacks
stay several lines in text, with each exception's message on one; in JSON every record is one line.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from loramux.escaping import escape

TEXT, JSON = "text", "json"
FORMATS = (TEXT, JSON)

_MOST_CHARACTERS = 8192  # of one message or one field; what a peer sent may be megabytes
_MOST_GROUPED = 16  # exceptions shown of one group
_PLAIN = re.compile(r"[\w.:/+@,|*-]+", re.ASCII)
_FIELDS = "loramux_fields"

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

log = logging.getLogger(__name__)


def configure(level: str, format: str = TEXT) -> None:
    """Log to standard error in `format`, records of `level` ("debug" … "error") and above, of all libraries.

    Libraries that brought a handler of their own lose it. Warnings and what threads die of are logged as well.
    """
    handler = _StandardError()
    handler.setFormatter(JsonFormatter() if format == JSON else TextFormatter())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level.upper())
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)
    threading.excepthook = _thread_died
    sys.unraisablehook = _unraisable


class _StandardError(logging.StreamHandler[Any]):
    """Writes to what sys.stderr is now: while a progress bar is shown, to what prints above it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def in_json() -> bool:
    """Whether `configure` was told to log JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.root.handlers)


def fields(**values: object) -> dict[str, Any]:
    """For `extra=`: named values of a record: name=value after the message in text, members in JSON."""
    return {_FIELDS: values}


class TextFormatter(logging.Formatter):
    """`time level logger: message name=value …`, then the traceback if there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = escape(super().formatMessage(record), limit=_MOST_CHARACTERS)
        return " ".join([line, *(f"{name}={_text_value(value)}" for name, value in _fields(record).items())])

    def formatException(self, ei: Any) -> str:
        return format_exception(ei)

    def formatStack(self, stack_info: str) -> str:
        return "\n".join(map(escape, stack_info.split("\n")))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the record's fields, `exception` with its traceback.

    Strings are escaped as in text: showing a decoded one on a terminal is safe as well.
    """

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": escape(record.getMessage(), limit=_MOST_CHARACTERS),
        }
        content |= {name: _json_value(value) for name, value in _fields(record).items()}
        if record.exc_info:
            content["exception"] = format_exception(record.exc_info)
        return json.dumps(content)  # ASCII only, whatever standard error's encoding is


def format_exception(info: ExcInfo) -> str:
    """A traceback of which no line is an exception's own making: each message is one escaped line."""
    error = info[1]
    return "" if error is None else "\n".join(_lines(error, seen=set()))


def _lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    """The lines of an exception with what caused it before it and, of a group, its members after it."""
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _lines(before, seen)
        yield "It was the direct cause of:" if error.__cause__ is not None else "While it was handled, there came:"
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):"
        for frame in traceback.format_tb(error.__traceback__):
            yield from map(escape, frame.rstrip("\n").split("\n"))
    shown = traceback.TracebackException(type(error), error, None)
    notes, shown.__notes__ = shown.__notes__, None  # it would split them into lines
    for line in shown.format_exception_only():
        yield escape(line.rstrip("\n"), limit=_MOST_CHARACTERS)
    for note in notes or ():
        yield escape(f"note: {note}", limit=_MOST_CHARACTERS)
    if isinstance(error, BaseExceptionGroup):
        for number, member in enumerate(error.exceptions[:_MOST_GROUPED], start=1):
            if id(member) not in seen:
                yield f"  member {number} of {len(error.exceptions)}:"
                yield from (f"  {line}" for line in _lines(member, seen))


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    found: Mapping[str, object] = getattr(record, _FIELDS, {})
    return found


def _text_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    return escape(json.dumps(text[:_MOST_CHARACTERS], ensure_ascii=False))


def _json_value(value: object) -> object:
    if isinstance(value, float) and math.isfinite(value):
        return round(value, 6)
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return escape(str(value), limit=_MOST_CHARACTERS)


def _thread_died(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit or args.exc_value is None:
        return
    name = args.thread.name if args.thread is not None else "?"
    log.error("thread %s ended with an exception", name, exc_info=args.exc_value)


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    log.error("%s", unraisable.err_msg or "an exception was ignored", exc_info=unraisable.exc_value)

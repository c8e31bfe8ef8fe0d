"""What is logged is one line a record and harmless to a terminal, from whatever source the text came."""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
from loramux import logs
from loramux.escaping import escape

HOSTILE = (
    "x\x1b[2J\r\n2026-01-01 00:00:00,000 I loramux: all is well\u202e\u2028\x85\x9b31m\x7f\u200b\U000e0041\ud800\x00"
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The process's logging is as it was, after each test."""
    root = logging.root
    before = (root.handlers[:], root.level, threading.excepthook, sys.unraisablehook)
    libraries = {
        logger: (logger.handlers[:], logger.propagate)
        for logger in root.manager.loggerDict.values()
        if isinstance(logger, logging.Logger)
    }
    yield
    logging.captureWarnings(False)
    root.handlers[:], level, threading.excepthook, sys.unraisablehook = before
    root.setLevel(level)
    for logger, (handlers, propagate) in libraries.items():
        logger.handlers[:], logger.propagate = handlers, propagate


def lines(captured: pytest.CaptureFixture[str]) -> list[str]:
    """The lines as a terminal or a collector sees them; each is harmless."""
    text = captured.readouterr().err
    assert text.endswith("\n")
    found = text[:-1].split("\n")
    assert all(line.isprintable() for line in found), [line for line in found if not line.isprintable()]
    return found


def test_escaped_text_is_one_printable_line() -> None:
    assert escape("Größe 值 \\n [/x]") == "Größe 值 \\n [/x]"
    assert escape("a\nb\x1b[0m\u202e\ud800") == r"a\nb\x1b[0m\u202e\ud800"
    assert escape(HOSTILE).isprintable()
    assert escape("y" * 10_000_000, limit=10) == "yyyyyyyyyy… (9999990 characters more)"


@pytest.mark.parametrize("format", logs.FORMATS)
def test_a_message_cannot_forge_a_line(capsys: pytest.CaptureFixture[str], format: str) -> None:
    logs.configure("info", format)
    logging.getLogger("loramux.x").info("name %s", HOSTILE, extra=logs.fields(id=HOSTILE, tokens=3, seconds=0.25))
    logging.getLogger("asyncio").error("from a library: %s", HOSTILE * 1000)
    found = lines(capsys)
    assert len(found) == 2
    assert max(map(len, found)) < 100_000


@pytest.mark.parametrize("format", logs.FORMATS)
def test_a_traceback_cannot_forge_a_line(capsys: pytest.CaptureFixture[str], format: str) -> None:
    logs.configure("info", format)
    try:
        try:
            raise ValueError(HOSTILE)
        except ValueError as error:
            error.add_note(HOSTILE)
            raise ExceptionGroup(HOSTILE, [KeyError(HOSTILE), SyntaxError(HOSTILE)]) from error
    except ExceptionGroup:
        logging.getLogger("loramux.x").exception("it failed")
    found = lines(capsys)
    assert not any(line.lstrip().startswith("2026-01-01") for line in found)
    for part in ("ValueError", "ExceptionGroup", "KeyError", "SyntaxError", "direct cause", "test_logs.py"):
        assert any(part in line for line in found)
    if format == logs.JSON:
        assert len(found) == 1
        shown = json.loads(found[0])["exception"].split("\n")
        assert shown[0] == "Traceback (most recent call last):"
        assert all(line.isprintable() for line in shown)


def test_json_lines_are_ascii_objects_with_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", logs.JSON)
    record = logs.fields(id="ü", tokens=3, seconds=0.25, lost=float("nan"), adapters=["a", "b"], none=None)
    logging.getLogger("loramux.x").warning("100 %% of %s", "ü", extra=record)
    (line,) = lines(capsys)
    assert line.isascii()
    content = json.loads(line)
    assert content.pop("time").endswith("+00:00")
    assert content == {
        "level": "warning",
        "logger": "loramux.x",
        "message": "100 % of ü",
        "id": "ü",
        "tokens": 3,
        "seconds": 0.25,
        "lost": "nan",
        "adapters": ["a", "b"],
        "none": None,
    }


def test_text_fields_cannot_be_taken_for_others(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    logging.getLogger("loramux.x").info(
        "request", extra=logs.fields(id='a" outcome=ok', outcome="error", adapters="a,b")
    )
    (line,) = lines(capsys)
    assert line.endswith(r'request id="a\" outcome=ok" outcome=error adapters=a,b')


def test_libraries_warnings_and_threads_go_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers brings a handler of its own, which wrote a model's texts to the terminal as they were."""
    library = logging.getLogger("tests.library")
    library.addHandler(logging.StreamHandler(sys.stderr))
    library.propagate = False
    logs.configure("info", logs.JSON)
    library.warning("one")
    with warnings.catch_warnings(action="always"):
        warnings.warn(HOSTILE, UserWarning, stacklevel=1)

    def die() -> None:
        raise ValueError(HOSTILE)

    thread = threading.Thread(target=die, name="doomed")
    thread.start()
    thread.join()
    found = [json.loads(line) for line in lines(capsys)]
    assert [content["logger"] for content in found] == ["tests.library", "py.warnings", "loramux.logs"]
    assert "doomed" in found[2]["message"]

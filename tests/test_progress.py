"""Long work as it is told: one bar at a time on a terminal, log lines elsewhere, and nothing that either obeys."""

from __future__ import annotations

import logging
import re
import sys
from io import StringIO

import pytest
from loramux import logs
from loramux.progress import Phases, bar
from loramux.terminal import Terminal
from rich.console import Console


def terminal(screen: StringIO) -> Console:
    return Terminal(file=screen, force_terminal=True, width=80)


def test_one_bar_at_a_time() -> None:
    """Two were shown, one above the other, while native operations were compiled."""
    screen = StringIO()
    with Phases(terminal(screen)) as phases:
        assert phases._bar is not None
        loading, compiling = phases.counting("Loading x"), phases.counting("Compiling y")
        phases.begin("Opening z")
        assert [task.description for task in phases._bar.tasks] == ["Opening z"]
        compiling(3, 11)
        assert [(task.description, task.completed, task.total) for task in phases._bar.tasks] == [
            ("Compiling y", 3, 11)
        ]
        loading(1, 2)
        assert [task.description for task in phases._bar.tasks] == ["Loading x"]
    assert not phases._bar.tasks
    assert "Loading x" in screen.getvalue()


def test_log_lines_stand_above_a_bar_and_by_themselves_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were written into the bar's line, which is erased a moment later."""
    screen = StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logs._StandardError()
    logger = logging.Logger("x")
    logger.addHandler(handler)
    with Phases(terminal(screen)) as phases:
        phases.begin("Opening z")
        logger.warning("the cache is full")
    assert "the cache is full\n" in screen.getvalue()
    before = screen.getvalue()
    logger.warning("y " * 80)
    assert screen.getvalue() == before + "y " * 80 + "\n"


def test_without_a_terminal_phases_are_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    screen = StringIO()
    now = 100.0
    with Phases(Terminal(file=screen), every=10.0, clock=lambda: now) as phases:
        phases.begin("Opening z")
        now += 2
        count = phases.counting("Loading x")
        count(0, 9)
        now += 9
        count(1, 9)
        now += 2
        count(2, 9)
        now += 9
        count(3, 9)
    assert screen.getvalue() == ""
    assert [record.message for record in caplog.records] == [
        "Opening z …",
        "Opening z: done in 2.0 s",
        "Loading x …",
        "Loading x: 2 of 9, 11 s",
        "Loading x: done in 20.0 s",
    ]


def test_a_phase_that_fails_is_not_called_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    phases = Phases(Terminal(file=StringIO()))
    phases.begin("Opening z")
    phases.__exit__(ValueError, ValueError("x"), None)
    assert [record.message for record in caplog.records] == ["Opening z …"]


def test_nobody_need_be_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Phases(None) as phases:
        phases.begin("Opening z")
        phases.counting("Loading x")(1, 2)
    assert not caplog.records


def test_a_title_is_neither_markup_nor_a_command(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    title = "Loading [/bold]\x1b]0;x\x07\nfake"
    screen = StringIO()
    with bar(terminal(screen), title) as count:
        count(1, 2)
    assert "[/bold]" in screen.getvalue()
    assert "\x1b]0" not in screen.getvalue()
    assert "\x07" not in screen.getvalue()
    assert not re.search("^fake", screen.getvalue(), re.MULTILINE)
    with Phases(Terminal(file=screen)) as phases:
        phases.begin(title)
    assert all(record.message.isprintable() for record in caplog.records)

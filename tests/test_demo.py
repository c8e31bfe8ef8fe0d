"""The server that `loramux demo` starts, without a model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from loramux.demo import serving

# Stands in for Python: writes what it was given as its ports, and ends on SIGTERM as a server does.
SERVER = """#!/bin/sh
trap 'exit 0' TERM
while [ "$1" != --ports-file ]; do shift; done
printf '{"isa": "%s", "threads": "%s", "port": "%s"}' "$LORAMUX_ISA" "$LORAMUX_THREADS" "$LORAMUX_PORT" >"$2.new"
mv "$2.new" "$2"
while :; do sleep 0.1; done
"""


def test_it_gets_what_is_set_for_the_machine_and_none_of_a_servers_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """LORAMUX_ISA and LORAMUX_THREADS were taken away with the settings."""
    stand_in = tmp_path / "python"
    stand_in.write_text(SERVER)
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    for name, value in (("ISA", "none"), ("THREADS", "3"), ("PORT", "99")):
        monkeypatch.setenv(f"LORAMUX_{name}", value)
    with serving("smollm2", tmp_path, []) as given:
        assert given == {"isa": "none", "threads": "3", "port": ""}

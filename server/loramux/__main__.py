"""Entry point of `loramux` and of `python -m loramux`: signals have their meaning before anything slow is imported."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> None:
    """Run the command that the arguments name.

    Until it runs there is nothing to undo, and SIGINT or SIGTERM ends the process at once: `serve` with 0, as while it
    loads, other commands with 128 + the signal's number. `serve` then has handlers of its own, to its end; what other
    commands have begun is undone on the way out.
    """
    serving = sys.argv[1:2] == ["serve"]
    interrupt = signal.getsignal(signal.SIGINT)  # ignored, perhaps, by a shell that runs this in the background
    _end_at_once(0 if serving else None)
    from loramux import cli

    try:
        if not serving:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, _leave)
        cli.main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if not serving:
            _end_at_once(None)  # Python's own way out would answer a signal with a traceback


def _end_at_once(status: int | None) -> None:
    """From now on a signal ends the process where it stands; `status` None: with 128 + the signal's number."""

    def end(number: int, frame: object) -> NoReturn:
        os._exit(128 + number if status is None else status)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _leave(number: int, frame: object) -> NoReturn:
    """What was begun is undone on the way out, as by Ctrl-C; a second signal ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()

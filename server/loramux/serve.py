"""`loramux serve`: check, load, show what was loaded, serve until told to stop, drain.

Loading is done in the main thread, outside any event loop, so that a signal ends it where it stands: what was begun
(a compiler, a download, a temporary folder) is undone on the way out.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from loramux import logs
from loramux.checks import check, reserved_ports
from loramux.config import Settings
from loramux.errors import DeviceLost, StartupError
from loramux.importing import heavy_imports
from loramux.progress import Phases

if TYPE_CHECKING:
    from loramux.assembly import Application
    from loramux.model.loading import LoadedModel
    from loramux.rpc.server import Addresses

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# As sysexits.h has it for an internal failure; a supervisor that starts the process again is all that helps.
DEVICE_LOST_STATUS = 70
_LAST_WORDS_SECONDS = 5.0  # for the requests of a lost device to be told
_GRACE_SECONDS = 10.0  # for what was begun to be undone; children get half of it
_IMPORT_GRACE_SECONDS = 0.5  # while nothing is begun: an import that swallows the signal would go on


class _Stopped(BaseException):
    """SIGTERM or SIGINT while loading."""


def run(settings: Settings, console: Console, ports_file: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain; while it still loads, leave at once. A second signal ends the process
    with status 1 whatever it does, and a device that has failed for good ends it with DEVICE_LOST_STATUS.

    Call it in the main thread. Raises StartupError if anything is not as it must be; nothing listens then.
    """
    started = time.monotonic()
    if settings.log_format == logs.JSON:  # whoever reads the lines reads nothing else: all is told by them
        console = Console(quiet=True, force_terminal=False)
    leaving = threading.Event()
    try:
        for number in _SIGNALS:
            signal.signal(number, partial(_leave, console, leaving, _IMPORT_GRACE_SECONDS))
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # nothing to reload yet, and no reason to die
        with Phases(console) as phases:
            phases.begin("Checking the settings")
            check(settings, ports_file)
            with reserved_ports(settings):
                phases.begin("Importing torch")
                with heavy_imports():
                    from loramux.assembly import prepare_model

                logs.configure(settings.log_level, settings.log_format)  # libraries have set up their own
                for number in _SIGNALS:
                    signal.signal(number, partial(_leave, console, leaving, _GRACE_SECONDS))
                loaded = prepare_model(settings, phases)
        asyncio.run(_run(settings, loaded, console, ports_file, started))
    except DeviceLost as error:
        log.critical("the device has failed while the model was prepared", exc_info=error)
        _abandon_device()
    except BaseException as error:
        # A native module whose import is interrupted raises something of its own.
        if not isinstance(error, _Stopped) and not leaving.is_set():
            raise
        _tell(console, "Stopped while loading.")
    finally:
        _end_at_next_signal(console)


def _leave(console: Console, leaving: threading.Event, grace: float, number: int, frame: object) -> NoReturn:
    leaving.set()
    _end_at_next_signal(console)
    # What waits for threads of its own (a download from a hub) would wait until they are done.
    overdue = threading.Timer(grace, _give_up, (console,))
    overdue.daemon = True
    overdue.start()
    raise _Stopped


def _end_at_next_signal(console: Console) -> None:
    for each in _SIGNALS:
        signal.signal(each, lambda number, frame: _exit(console, 1))


def _give_up(console: Console) -> None:
    try:
        _tell(console, "Stopped while loading.")
    finally:  # whatever became of the terminal
        _exit(console, 0)


def _exit(console: Console, status: int) -> NoReturn:
    """End the process where it stands, but for the terminal's cursor, which a bar hides."""
    try:
        console.show_cursor()
    finally:
        os._exit(status)


async def _run(
    settings: Settings, loaded: LoadedModel, console: Console, ports_file: Path | None, started: float
) -> None:
    from loramux.assembly import assemble
    from loramux.tables import startup_table

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, _on_signal, stop, console)
    application = assemble(settings, loaded)
    # Hundreds of thousands of objects by now, all here to stay: a full collection that walks them is felt as a pause.
    gc.collect()
    gc.freeze()
    await application.engine.start()
    watching = asyncio.create_task(_end_with_device(application, console))
    try:
        addresses = await _start(application, stop, console)
        reloads: set[asyncio.Task[None]] = set()
        loop.add_signal_handler(signal.SIGHUP, _on_hangup, application, reloads)
        console.print(startup_table(application, addresses))
        if ports_file is not None:
            _write(ports_file, addresses)
        seconds = time.monotonic() - started
        where = {name: address for name, address in asdict(addresses).items() if address}
        log.info("ready after %.1f s", seconds, extra=logs.fields(model=application.settings.model, **where))
        console.print(f"Serving after {seconds:.1f} s. Stop with Ctrl-C.")
        await _serve(application, stop, console)
    finally:
        watching.cancel()
        await application.engine.stop()


async def _start(application: Application, stop: asyncio.Event, console: Console | None) -> Addresses:
    """Listen and load the adapters. Raises _Stopped if `stop` is set before that is done; nothing listens then."""
    with Phases(console) as phases:
        phases.begin("Loading adapters")
        starting = asyncio.create_task(application.server.start())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.wait((starting,))
                raise _Stopped
            return starting.result()
        finally:
            stopping.cancel()


async def _serve(application: Application, stop: asyncio.Event, console: Console) -> None:
    await stop.wait()
    timeout = application.settings.drain_timeout
    _tell(console, f"Draining: running requests have {timeout:g} s.")
    cancelled = await application.server.drain()
    _tell(console, f"Stopped; {cancelled} requests were cancelled.")


async def _end_with_device(application: Application, console: Console) -> None:
    """Waits for the loss of the device, and ends the process once its requests have been told."""
    await application.engine.device_lost.wait()
    overdue = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (DEVICE_LOST_STATUS,))
    overdue.daemon = True
    overdue.start()
    _tell(console, "The device has failed; only a new process can use it again.")
    try:
        await application.server.drain()
    finally:
        _abandon_device()


def _abandon_device() -> NoReturn:
    """End the process with nothing undone: what it holds on a lost device cannot be given back, and trying to may
    never end."""
    logging.shutdown()
    os._exit(DEVICE_LOST_STATUS)


def _tell(console: Console, text: str) -> None:
    if console.quiet:
        log.info("%s", text)
    else:
        console.print(text)


def _on_signal(stop: asyncio.Event, console: Console) -> None:
    if stop.is_set():
        _tell(console, "Second signal: leaving now.")
        _exit(console, 1)
    stop.set()


def _on_hangup(application: Application, reloads: set[asyncio.Task[None]]) -> None:
    task = asyncio.get_running_loop().create_task(application.adapters.reload())
    reloads.add(task)  # the loop itself keeps only weak references
    task.add_done_callback(reloads.discard)


def _write(path: Path, addresses: Addresses) -> None:
    """Appears complete or not at all, so that whoever waits for it may read it at once."""
    content = {
        "public": addresses.public,
        "admin": addresses.admin,
        "metrics": addresses.metrics,
        "pid": os.getpid(),
    }
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(content) + "\n")
        scratch.rename(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise StartupError(f"--ports-file: cannot write {path}: {error.strerror}") from None

"""`loramux serve`: load, show what was loaded, serve until told to stop, drain."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import time
from pathlib import Path

from rich.console import Console

from loramux.assembly import Application, assemble, prepare_model
from loramux.config import Settings
from loramux.progress import bars
from loramux.rpc.server import Addresses
from loramux.tables import startup_table

log = logging.getLogger(__name__)


async def run(settings: Settings, console: Console, ports_file: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends the process at once.

    Raises StartupError if anything is not as it must be; nothing listens then.
    """
    started = time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop, console)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # nothing to reload yet, and no reason to die
    with bars(console, f"Loading {settings.model}", "Compiling native operations") as (loading, compiling):
        loaded = await asyncio.to_thread(prepare_model, settings, loading, compiling)
    application = assemble(settings, loaded)
    # Hundreds of thousands of objects by now, all here to stay: a full collection that walks them is felt as a pause.
    gc.collect()
    gc.freeze()
    await application.engine.start()
    try:
        addresses = await application.server.start()
        reloads: set[asyncio.Task[None]] = set()
        loop.add_signal_handler(signal.SIGHUP, _on_hangup, application, reloads)
        console.print(startup_table(application, addresses))
        if ports_file is not None:
            _write(ports_file, addresses)
        console.print(f"Serving after {time.monotonic() - started:.1f} s. Stop with Ctrl-C.", highlight=False)
        await _serve(application, stop, console)
    finally:
        await application.engine.stop()


async def _serve(application: Application, stop: asyncio.Event, console: Console) -> None:
    await stop.wait()
    timeout = application.settings.drain_timeout
    console.print(f"Draining: running requests have {timeout:g} s.", highlight=False)
    cancelled = await application.server.drain()
    console.print(f"Stopped; {cancelled} requests were cancelled.", highlight=False)


def _on_signal(stop: asyncio.Event, console: Console) -> None:
    if stop.is_set():
        console.print("Second signal: leaving now.")
        os._exit(1)
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
    scratch.write_text(json.dumps(content) + "\n")
    scratch.rename(path)

"""The server's side of merging: one child process at a time, its progress as a stream. Imports no torch."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import grpc

from loramux.errors import Draining, EngineFault, Overloaded
from loramux.lora.folder import as_folder
from loramux.lora.ingredient import Ingredient
from loramux.lora.merge_root import MergeRoot
from loramux.new_folder import check_new
from loramux.rpc import status
from loramux.rpc.ports import MergeDone, MergeStep

log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "loramux.merge_worker")
_GRACE_SECONDS = 10.0  # for the child to end between two tensors and to remove what it wrote
_RETRY_SECONDS = 10.0


class MergeProcess:
    """Merges adapters into the base `model` names, under `root`. Used by one event loop. See rpc.ports.Merger."""

    def __init__(self, model: str, root: Path | None, *, command: Sequence[str] = WORKER) -> None:
        self._model = model
        self._root = MergeRoot(root)
        self._command = tuple(command)
        self._idle = asyncio.Event()
        self._idle.set()
        self._child: asyncio.subprocess.Process | None = None
        self._closed = False

    async def merge(
        self, ingredients: Sequence[Ingredient], output: str, dtype: str
    ) -> AsyncGenerator[MergeStep | MergeDone, None]:
        """Progress, then one MergeDone. Closing the generator ends the child and removes what it wrote.

        Raises InvalidRequest, PathNotAllowed or FolderExists (`output`); Overloaded while another merge runs; what
        `loramux.merge.merge` raises; Draining after `close`; EngineFault if the child ends without a word.
        """
        self._check_open()
        if not self._idle.is_set():
            raise Overloaded(
                "a merge runs already, and there is one at a time; try again when it is done",
                reason="MERGE_RUNNING",
                retry_after=_RETRY_SECONDS,
            )
        self._idle.clear()
        try:
            out = await asyncio.to_thread(self._place, output)
            pipe = asyncio.subprocess.PIPE
            child = self._child = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=pipe,
                stdout=pipe,
                process_group=0,  # Ctrl-C is for the server, which ends it
            )
            try:
                self._check_open()
                await _send(child, self._job(ingredients, out, dtype))
                assert child.stdout is not None
                async for line in child.stdout:
                    message = json.loads(line)
                    if "error" in message:
                        _raise(message["error"])
                    if "report" in message:
                        yield MergeDone(str(out), **message["report"])
                        return
                    yield MergeStep(message["done"], message["total"])
                self._check_open()
                log.error("the merge into %s ended with exit status %s", out, await child.wait())
                raise EngineFault("the merge's process ended before it was done; the server's log may say why")
            finally:
                await _end(child)
        finally:
            self._child = None
            self._idle.set()

    async def close(self) -> None:
        """End the merge that runs, if one does, and refuse others."""
        self._closed = True
        if self._child is not None:
            await _end(self._child)
        with suppress(TimeoutError):  # whoever follows the merge may be waiting for its client to read
            async with asyncio.timeout(_GRACE_SECONDS):
                await self._idle.wait()

    def _check_open(self) -> None:
        if self._closed:
            raise Draining("the server is shutting down and merges no more; run `loramux merge` beside it")

    def _place(self, output: str) -> Path:
        out = self._root.resolve(output)
        check_new(out)
        return out

    def _job(self, ingredients: Sequence[Ingredient], out: Path, dtype: str) -> bytes:
        folders = [as_folder(i.folder) for i in ingredients]
        parts = [
            (i.name, str(folder), [str(root) for root in folder.roots], i.weight, i.digest)
            for i, folder in zip(ingredients, folders, strict=True)
        ]
        return json.dumps({"model": self._model, "parts": parts, "out": str(out), "dtype": dtype}).encode()


async def _send(child: asyncio.subprocess.Process, job: bytes) -> None:
    assert child.stdin is not None
    child.stdin.write(job)
    child.stdin.close()


async def _end(child: asyncio.subprocess.Process) -> None:
    """Until it is gone: of itself, by SIGTERM, and at last by SIGKILL; then the next merge clears what it left."""
    if child.returncode is None:
        try:
            async with asyncio.timeout(_GRACE_SECONDS):
                child.terminate()
                await child.wait()
        except ProcessLookupError:
            pass
        except TimeoutError:
            child.kill()
            await child.wait()


def _raise(error: Mapping[str, str]) -> NoReturn:
    details = base64.b64decode(error["details"])
    raise status.to_error(grpc.StatusCode[error["code"]], error["message"], details)

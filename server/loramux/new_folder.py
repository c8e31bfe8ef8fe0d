"""A folder that appears complete or not at all, whatever kills its writer.

It is written beside its place under a hidden name and renamed when all of it is on disk. Whoever writes holds a lock
on the hidden folder, which the kernel drops with the process: so the next writer knows what is left over and clears
it. Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux.errors import FolderExists, InvalidRequest, Overloaded
from loramux.lora.roots import NAME_RULE, is_name

_MARK = ".loramux-partial-"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields the hidden folder to write into; leaving without an error turns it into `target`, fsynced.

    Leaving with an error removes it. Raises FolderExists if `target` is there, before or after; InvalidRequest for a
    name that no adapter could have, or if the folder that is to hold it is not there or may not be written to;
    Overloaded (DISK_FULL) if the disk is full.
    """
    check_new(target)
    try:
        with _writing(target) as scratch:
            yield scratch
    except PermissionError as error:
        raise InvalidRequest("output", f"cannot write in {target.parent}: {error.strerror}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"the disk of {target.parent} is full; free some of it"
        raise Overloaded(text, retry_after=None, reason="DISK_FULL") from error


@contextmanager
def _writing(target: Path) -> Iterator[Path]:
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    scratch = held = None
    try:
        with _locked(parent):  # so that nobody clears a folder between its making and its locking
            _clear(target.parent)
            scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:64]}{_MARK}"))
            held = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield scratch
        for path in scratch.rglob("*"):
            _sync(path)
        scratch.chmod(0o755)
        os.fsync(held)
        try:
            scratch.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise _exists(target) from None
        os.fsync(parent)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            os.close(held)
        os.close(parent)


def check_new(target: Path) -> None:
    """Raises what `new_folder` would."""
    try:
        os.lstat(target)
        raise _exists(target)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, say
        raise InvalidRequest("output", f"{target} cannot be made: {error.strerror}") from error
    if not is_name(target.name):  # it is shown and logged from now on, and may become an adapter's or a model's
        raise InvalidRequest("output", f"{target.name!r} cannot be a new folder's name; {NAME_RULE}")
    if not target.parent.is_dir():
        raise InvalidRequest("output", f"{target.parent} is no folder to write into; make it first")


def _exists(target: Path) -> FolderExists:
    return FolderExists(f"{target} exists already; name a new folder, or remove this one", metadata={"path": target})


def _clear(parent: Path) -> None:
    """Remove what writers that were killed left behind."""
    for path in parent.glob(f".*{_MARK}*"):
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # it was complete and renamed just now, or it is somebody else's
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its writer lives
        finally:
            os.close(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)  # of a folder too
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: int) -> Iterator[None]:
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)

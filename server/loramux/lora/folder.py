"""One adapter's folder, opened so that it cannot be exchanged for one outside the roots. Imports no torch.

Where links lead is looked up first; what is opened then is the real path, relative to a descriptor of its root, and
without a link in it (lora.beneath). Whoever exchanges a folder for a link in between gets an error.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loramux.errors import InvalidAdapter, PathNotAllowed
from loramux.lora.beneath import FILE, FOLDER, LINK_ERRORS, open_beneath

_ATTEMPTS = 8  # at a link that becomes another one while it is looked up


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """`path` is real, without links, and lies in one of `roots`, which are real, too. Holds nothing open."""

    path: Path
    roots: tuple[Path, ...]

    @classmethod
    def trusted(cls, path: Path) -> AdapterFolder:
        """A folder whose links may lead anywhere: the caller may read all that this process can."""
        return cls(Path(os.path.realpath(path)), (Path("/"),))

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def opened(self) -> Iterator[OpenedFolder]:
        """The folder as it is now, for as long as the context lasts, whatever becomes of its path.

        Raises OSError; InvalidAdapter if its path has a link by now.
        """
        root = root_of(self.path, self.roots)
        assert root is not None, f"{self.path} is not under {self.roots}"
        try:
            descriptor = _open_real(root, self.path, FOLDER)
        except OSError as error:
            if error.errno in LINK_ERRORS and not os.path.isdir(self.path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path)) from None
            if error.errno in LINK_ERRORS:
                raise exchanged(str(self.path)) from None
            raise
        try:
            yield OpenedFolder(self, descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class OpenedFolder:
    """A folder and its descriptor."""

    folder: AdapterFolder
    descriptor: int

    def open(self, name: str) -> int:
        """A descriptor, nonblocking, of the file `name`; if it is a link, of what it leads to within the roots.

        Raises OSError; PathNotAllowed for a link that leads out; InvalidAdapter for one that changes all the time.
        """
        for _ in range(_ATTEMPTS):
            try:
                return open_beneath(self.descriptor, name, FILE)
            except OSError as error:
                if error.errno not in LINK_ERRORS:
                    raise
            try:
                target = os.readlink(name, dir_fd=self.descriptor)
            except OSError as error:
                if error.errno == errno.EINVAL:  # a file by now
                    continue
                raise
            real = real_path(self.folder.path / target)
            root = root_of(real, self.folder.roots)
            if root is None:
                raise not_allowed(str(self.folder.path / name), self.folder.roots)
            try:
                return _open_real(root, real, FILE)
            except OSError as error:
                if error.errno not in LINK_ERRORS:
                    raise
                os.stat(real)  # raises if it leads in a circle
        raise exchanged(name)

    def names(self, most: int) -> list[str]:
        """What lies in the folder, sorted; `most` of it. Empty if it cannot be listed."""
        try:
            with (
                _descriptor(open_beneath(self.descriptor, ".", os.O_RDONLY | os.O_DIRECTORY)) as listed,
                os.scandir(listed) as entries,
            ):
                return sorted(entry.name for entry in islice(entries, most))
        except OSError:
            return []

    def holds(self, path: str) -> bool:
        """Whether there is something beneath the folder at `path`, without a link on the way."""
        try:
            os.close(open_beneath(self.descriptor, path, FILE))
        except OSError:
            return False
        return True


def as_folder(folder: AdapterFolder | Path) -> AdapterFolder:
    """`folder`, or the trusted one of a path."""
    return folder if isinstance(folder, AdapterFolder) else AdapterFolder.trusted(folder)


def real_path(path: Path) -> Path:
    """`path` with `..` and links resolved as far as they lead. Raises InvalidAdapter if it changes all the time."""
    for _ in range(_ATTEMPTS):
        try:
            return Path(os.path.realpath(path))
        except OSError:  # it was a link when it was looked at, and none when it was read
            continue
    raise exchanged(str(path))


def root_of(real: Path, roots: Sequence[Path]) -> Path | None:
    """The first of `roots` that the real path lies in."""
    return next((root for root in roots if real.is_relative_to(root)), None)


def not_allowed(path: str, roots: Sequence[Path]) -> PathNotAllowed:
    """The error for a path that leads out of `roots`."""
    return PathNotAllowed(
        f"{path!r} leads outside the adapter roots {', '.join(map(str, roots)) or '(none)'} once `..` and symbolic "
        "links are resolved; copy the folder under a root, or start the server with another --adapter-dir",
        metadata={"path": path},
    )


def exchanged(path: str) -> InvalidAdapter:
    """The error for a path that was one thing when it was looked at and another when it was opened."""
    return InvalidAdapter(
        path,
        "was exchanged for a link or moved while it was read; write adapters to a new folder and rename it into place",
        reason="ADAPTER_FILES_CHANGED",
    )


def _open_real(root: Path, real: Path, flags: int) -> int:
    """A descriptor of `real`, a path without links in `root`; opened relative to that."""
    with _descriptor(os.open("/", FOLDER)) as top, _descriptor(open_beneath(top, "." + str(root), FOLDER)) as beneath:
        return open_beneath(beneath, str(real.relative_to(root)), flags)


@contextmanager
def _descriptor(opened: int) -> Iterator[int]:
    try:
        yield opened
    finally:
        os.close(opened)

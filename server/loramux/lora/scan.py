"""Which adapter folders lie under the roots, and which folders cannot be served, and why. Imports no torch.

Runs in a worker and only looks: what it finds may have changed when it is opened, so opening checks again
(lora.folder). One entry that cannot be looked at is told, and hides no other.

A folder of a Hugging Face cache (`models--ORG--NAME` in its `hub` folder, or that folder as a root) is the adapter
`ORG--NAME`: the snapshot that `refs/main` names, or the only one there is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from loramux.errors import InvalidRequest
from loramux.files import at_once
from loramux.lora.chat_template import TEMPLATE_FILES
from loramux.lora.folder import root_of
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE, check_name

Identity = tuple[object, ...]

_CACHED = "models--"  # huggingface_hub's folders of models
_MOST_ENTRIES = 256  # of a folder that changes are looked at
_OUTSIDE = "leads outside the adapter roots; copy it under a root, or make where it leads another --adapter-dir"
_NOWHERE = "is a link that leads nowhere"
_UNCLEAR = (
    "has several snapshots in the cache, and its refs/main names none of them; download it again, or load one of them "
    "by its path (models--…/snapshots/…)"
)
_CIRCLE = "is a link that leads in a circle"


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter folder, and what tells one version of its files from another: inode, size and times of both."""

    root: Path | None
    path: str
    identity: Identity
    device: int | None = field(default=None, compare=False)  # that the root was on


@dataclass(slots=True)
class Look:
    """`found` by name, and how that differs from the look before.

    skipped   folder name → why it is no adapter, as the rest of a sentence
    half      those of `skipped` that lack one of the two files: somebody may be writing it
    unread    root → why it could not be read; its folders are as they were
    contents  name → all that lies in the folder, of those asked for
    """

    found: dict[str, Found] = field(default_factory=dict)
    appeared: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    half: set[str] = field(default_factory=set)
    unread: dict[Path, str] = field(default_factory=dict)
    contents: dict[str, Identity] = field(default_factory=dict)


class _Unfit(Exception):
    """A folder that cannot be served; `half` if only a file is missing."""

    def __init__(self, why: str, *, half: bool = False) -> None:
        super().__init__(why)
        self.half = half


def scan(
    roots: Sequence[Path],
    before: Mapping[str, Found],
    changing: Set[str] = frozenset(),
    followed: Mapping[str, str] = MappingProxyType({}),
) -> Look:
    """Look at the roots; of one name in two the first root's folder counts. Of `changing` names all content is told;
    `followed` are name → path of folders elsewhere, which come before the roots' and are told whatever they hold."""
    look = Look(found={name: Found(None, path, identity_of(path)) for name, path in followed.items()})
    for root in roots:
        try:
            device = os.stat(root).st_dev
            for name, path in _folders(root, roots, look, before):
                _add(look, roots, Found(root, path, (), device), name, before)
        except OSError as error:
            look.unread[root] = error.strerror or str(error)
    away = {root for root in roots if root in look.unread or _emptied(root, look, before)}
    for name, known in before.items():
        if name not in look.found and known.root in away:
            look.found[name] = known
    for root in away - look.unread.keys():
        look.unread[root] = "it is empty, and on another device than before; is it mounted?"
    for name, found in look.found.items():
        known_before = before.get(name)
        if known_before is None:
            look.appeared.append(name)
        elif known_before != found:
            look.changed.append(name)
    look.gone = [name for name in before if name not in look.found]
    look.contents = {name: contents(look.found[name].path) for name in changing if name in look.found}
    return look


def identity_of(folder: str) -> Identity:
    """Of both files and of those that may hold a chat template, wherever links lead; what cannot be looked at has
    none."""
    return (*_stats(folder, (CONFIG_FILE, WEIGHTS_FILE)), *_stats(folder, TEMPLATE_FILES))


def _stats(folder: str, files: Sequence[str]) -> Identity:
    identity: list[object] = []
    for file in files:
        try:
            identity += _identity(os.stat(f"{folder}/{file}"))
        except OSError:
            identity.append(None)
    return tuple(identity)


def contents(folder: str) -> Identity:
    """All that lies in a folder, with sizes and times: a copy that runs beside the two files is seen, too."""
    found: list[object] = []
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, _MOST_ENTRIES):
                status = entry.stat(follow_symlinks=False)
                found.append((entry.name, status.st_size, status.st_mtime_ns))
    except OSError:
        found.append(None)  # something went while we looked
    return tuple(sorted(found, key=repr))


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _folders(root: Path, roots: Sequence[Path], look: Look, before: Mapping[str, Found]) -> Iterator[tuple[str, str]]:
    """Name and path of each folder in `root`. Raises OSError if that cannot be listed."""
    if root.name.startswith(_CACHED) and (snapshot := _snapshot(str(root))) is not None:
        yield root.name.removeprefix(_CACHED), snapshot
        return
    with os.scandir(root) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.name.startswith("."):
            continue
        if entry.name in before and entry.is_symlink():  # what was served and leads elsewhere now has changed
            yield entry.name, _real(entry.path)
            continue
        try:
            folder = entry.is_dir()
        except OSError as error:
            look.skipped[entry.name] = _CIRCLE if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
            continue
        if entry.is_symlink():
            why = _NOWHERE if not os.path.exists(entry.path) else _OUTSIDE if _leads_out(entry.path, roots) else None
            if why is not None:
                look.skipped[entry.name] = why
                continue
        path = _real(entry.path) if entry.is_symlink() else entry.path
        if not folder:
            continue
        if entry.name.startswith(_CACHED):
            name, snapshot = entry.name.removeprefix(_CACHED), _snapshot(path)
            if snapshot is not None:
                yield name, snapshot
            elif _has_adapters(path):
                look.skipped[name] = _UNCLEAR
        else:
            yield entry.name, path


def _snapshot(cached: str) -> str | None:
    """The folder of the revision that a cached repository stands for; None if there is none, or which is not clear."""
    try:
        names = sorted(os.listdir(f"{cached}/snapshots"))
    except OSError:
        return None
    try:
        with open(f"{cached}/refs/main", encoding="ascii", opener=at_once) as file:
            main = file.read(64).strip()
    except (OSError, ValueError):
        main = ""
    if main in names:
        return f"{cached}/snapshots/{main}"
    return f"{cached}/snapshots/{names[0]}" if len(names) == 1 else None


def _has_adapters(cached: str) -> bool:
    """Whether a cached repository, of which no snapshot stands out, has adapters: most of a cache are models."""
    try:
        with os.scandir(f"{cached}/snapshots") as entries:
            return any(os.path.lexists(f"{entry.path}/{CONFIG_FILE}") for entry in islice(entries, _MOST_ENTRIES))
    except OSError:
        return False


def _add(look: Look, roots: Sequence[Path], place: Found, name: str, before: Mapping[str, Found]) -> None:
    """Add an adapter folder to what was found, or to what was skipped; a folder without such files to neither."""
    if name in look.found:
        return
    try:
        identity = _checked_identity(place.path, roots)
        if identity is None:
            return
        check_name(name)
    except _Unfit as unfit:
        # What is known stays known: reading it says what is wrong.
        if name in before:
            look.found[name] = replace(place, identity=identity_of(place.path))
            return
        look.skipped[name] = str(unfit)
        if unfit.half:
            look.half.add(name)
    except InvalidRequest as error:
        look.skipped[name] = f"has no name that can be asked for: {error.description}; rename it"
    else:
        look.found[name] = replace(place, identity=identity)


def _checked_identity(folder: str, roots: Sequence[Path]) -> Identity | None:
    """None for a folder without any of the two files. Raises _Unfit. In strings: of thousands of folders, making paths
    would take most time."""
    identity: list[object] = []
    missing = []
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        path = f"{folder}/{file}"
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                status = _followed(path, roots)
        except FileNotFoundError:
            missing.append(file)
            continue
        except OSError as error:
            raise _Unfit(f"cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise _Unfit(f"has {file}, which is not a regular file")
        identity += _identity(status)
    if len(missing) == 2:
        return None
    if missing:
        raise _Unfit(f"has no {missing[0]}", half=True)
    return (*identity, *_stats(folder, TEMPLATE_FILES))


def _followed(path: str, roots: Sequence[Path]) -> os.stat_result:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise _Unfit(f"has {os.path.basename(path)}, which {_NOWHERE}", half=True) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _Unfit(f"has {os.path.basename(path)}, which {_CIRCLE}") from None
        raise
    if _leads_out(path, roots):
        raise _Unfit(f"has {os.path.basename(path)}, which {_OUTSIDE}")
    return status


def _leads_out(path: str, roots: Sequence[Path]) -> bool:
    return root_of(Path(_real(path)), roots) is None


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except OSError:  # it changes while it is looked at; opening checks again
        return path


def _emptied(root: Path, look: Look, before: Mapping[str, Found]) -> bool:
    """Whether a root whose folders we knew is empty now and on another device: unmounted, rather than cleared."""
    known = next((found for found in before.values() if found.root == root), None)
    if known is None or any(found.root == root for found in look.found.values()):
        return False
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is None and os.stat(root).st_dev != known.device
    except OSError:
        return True

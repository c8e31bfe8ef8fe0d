"""Where adapters may come from: folders under the allowed roots, a hub if there is one, and nothing else. No torch.

Knows names and paths, not what the files say. It touches the file system, so it runs in a worker.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from loramux.errors import InvalidAdapter, InvalidRequest, PathNotAllowed, StartupError
from loramux.lora.folder import AdapterFolder, not_allowed, real_path, root_of
from loramux.lora.hub import PREFIX, Hub
from loramux.values import ADAPTER_NAME

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MAX_SOURCE = 4096  # PATH_MAX

NAME_RULE = "names have 1 to 128 characters of [A-Za-z0-9._-] and start with a letter or digit"


def is_name(text: str) -> bool:
    """Whether clients may use it for an adapter."""
    return ADAPTER_NAME.fullmatch(text) is not None


def check_name(name: str, *, field: str = "name") -> str:
    """`name` if clients may use it for an adapter; raises InvalidRequest otherwise."""
    if not is_name(name):
        shown = name if len(name) <= 128 else f"{name[:64]}… ({len(name)} characters)"
        raise InvalidRequest(
            field,
            f"{shown!r} is not an adapter name; {NAME_RULE}",
            reason="INVALID_ADAPTER_NAME",
        )
    return name


def check_path(text: str, field: str, hint: str) -> None:
    """Raises InvalidRequest for `field` if no path could be written like this."""
    if not text:
        raise InvalidRequest(field, f"is empty; {hint}")
    if len(text) > _MAX_SOURCE:
        raise InvalidRequest(field, f"has {len(text)} characters; the limit is {_MAX_SOURCE}")
    try:
        usable = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise InvalidRequest(field, "holds a NUL or a character that no file name can hold")


class AdapterRoots:
    """The allowed roots, resolved once; `allowed` has the hub's cache, too. Immutable; safe in any thread."""

    def __init__(self, paths: Sequence[Path | str], hub: Hub | None = None) -> None:
        self.paths: tuple[Path, ...] = tuple(dict.fromkeys(Path(os.path.realpath(p)) for p in paths))
        self._hub = hub
        self.allowed = self.paths if hub is None else (*self.paths, Path(os.path.realpath(hub.cache)))

    def check(self) -> None:
        """Raise StartupError unless every root is a folder that can be listed."""
        for path in self.paths:
            try:
                with os.scandir(path):
                    pass
            except OSError as error:
                hint = "name a folder that is there, and that the server may read"
                if any(separator in str(path) for separator in ":;,"):
                    hint = "of several roots each has its --adapter-dir, or a comma between them in LORAMUX_ADAPTER_DIR"
                raise StartupError(f"--adapter-dir {path}: {error.strerror}; {hint}") from None

    def resolve(self, source: str) -> AdapterFolder:
        """The adapter folder that `source` names.

        `source` is absolute, or relative to the roots, which are searched in order. `..` and symbolic links are
        resolved before the check, and the adapter's two files may not be links that leave the roots either. What is
        opened later is held to the same, whatever was exchanged meanwhile: see lora.folder.

        Raises InvalidRequest for text that is no path, PathNotAllowed for a path outside the roots (whether it exists
        or not: the answer tells nothing about other folders), InvalidAdapter with the reason ADAPTER_FILES_MISSING
        where there is no such folder. `hub:…` is fetched, see lora.hub.
        """
        check_path(source, "source", "name a folder under the adapter roots")
        if source.startswith(PREFIX):
            source = self._fetch(source)
        searched = [Path(source)] if os.path.isabs(source) else [root / source for root in self.paths]
        inside = False
        for path in searched:
            real = real_path(path)
            if root_of(real, self.allowed) is None:
                continue
            inside = True
            if _is_folder(real, source):
                self._check_files(real)
                return AdapterFolder(real, self.allowed)
        if searched and not inside:
            raise not_allowed(source, self.paths)
        raise InvalidAdapter(
            "source", self._missing(source), reason="ADAPTER_FILES_MISSING", metadata={"source": source}
        )

    def _fetch(self, source: str) -> str:
        if self._hub is None:
            raise PathNotAllowed(
                "this server takes no adapters from a hub; start it with --adapter-hub ORG/NAME (patterns such as "
                "'acme/*' are understood), or copy the folder under a root",
                metadata={"path": source},
            )
        return str(self._hub.fetch(source, (CONFIG_FILE, WEIGHTS_FILE)))

    def _missing(self, source: str) -> str:
        if not self.paths:
            return f"there is no folder {source!r}: the server was started without --adapter-dir"
        return (
            f"there is no folder {source!r}; searched the adapter roots {self._listed()}. Put a folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE} there"
        )

    def _check_files(self, folder: Path) -> None:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if root_of(real_path(folder / name), self.allowed) is None:
                raise not_allowed(str(folder / name), self.paths)

    def _listed(self) -> str:
        return ", ".join(map(str, self.paths)) or "(none)"


def _is_folder(real: Path, source: str) -> bool:
    """Raises InvalidAdapter where that cannot be seen; whatever leads nowhere or in a circle is none."""
    try:
        return stat.S_ISDIR(os.stat(real).st_mode)
    except PermissionError as error:
        raise InvalidAdapter(
            "source", f"{source!r} cannot be read: {error.strerror}", reason="ADAPTER_FILES_UNREADABLE"
        ) from None
    except OSError:
        return False

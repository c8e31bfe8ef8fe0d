"""An adapter folder's two files as they were at one moment. Imports no torch.

Files are read into memory once and hashed on the way. They are never mapped: a mapped file that someone cuts off
while it is read kills the process with SIGBUS. Runs in a worker; hashing and reading release the interpreter's lock.

The digest of an adapter is "sha256:" and the hex of SHA-256 over, for each file in the order adapter_config.json,
adapter_model.safetensors: its name in ASCII, a zero byte, its length as 8 bytes little endian, its bytes.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from loramux.errors import InvalidAdapter
from loramux.lora.folder import AdapterFolder, OpenedFolder, as_folder
from loramux.lora.header import LENGTH_BYTES, START_BYTES, TensorEntry, header_length, parse_header
from loramux.lora.host_memory import allocate
from loramux.lora.layout import SCALE_BYTES, aligned
from loramux.lora.limits import ReadLimits
from loramux.lora.matching import parse_key
from loramux.lora.missing import missing
from loramux.lora.peft_config import PeftConfig, parse_config
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class FolderSnapshot:
    """The bytes of both files, the checked header of the second, and the digest of both."""

    config: bytes
    weights: memoryview
    entries: tuple[TensorEntry, ...]
    digest: str


def take_snapshot(folder: AdapterFolder | Path, limits: ReadLimits) -> FolderSnapshot:
    """Read both files.

    Raises InvalidAdapter: missing, too large, broken header, or changed while it was read.
    """
    digest = hashlib.sha256()
    with _opened(folder, limits) as (config_file, weights_file):
        config = bytes(_read(config_file, digest))
        weights = _read(weights_file, digest)
        size = len(weights)
        length = header_length(bytes(weights[:START_BYTES]), size, limits)
        entries = parse_header(bytes(weights[LENGTH_BYTES : LENGTH_BYTES + length]), size, limits)
    return FolderSnapshot(config, weights, entries, f"sha256:{digest.hexdigest()}")


def folder_digest(folder: AdapterFolder | Path, limits: ReadLimits) -> str:
    """The digest alone, in constant memory.

    Raises InvalidAdapter as take_snapshot does, the header excepted.
    """
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    with _opened(folder, limits) as files:
        for file in files:
            _start(file, digest)
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    return f"sha256:{digest.hexdigest()}"


def read_beside(folder: AdapterFolder | Path, name: str, limit: int) -> bytes | None:
    """Another file of the folder; None if there is none.

    Raises InvalidAdapter for one that cannot be read or has more than `limit` bytes, PathNotAllowed for a link that
    leads out of the roots.
    """
    try:
        with as_folder(folder).opened() as opened, _open(opened, name, limit) as file:
            return file.read(limit)
    except FileNotFoundError:  # the folder is gone
        return None
    except InvalidAdapter as error:
        if error.reason == "ADAPTER_FILES_MISSING":
            return None
        raise
    except OSError as error:
        why = error.strerror or str(error)
        raise InvalidAdapter(name, f"cannot be read: {why}", reason="ADAPTER_FILES_UNREADABLE") from None


def measure(folder: AdapterFolder | Path, item_bytes: int, limits: ReadLimits) -> int:
    """Bytes that the adapter will take on a device of `item_bytes` a number; reads the config and the header.

    Exact for every adapter that can be loaded: each of its factors is used once and laid out as lora.layout says.
    Raises InvalidAdapter: as take_snapshot does, and for a config or a tensor that is not served.
    """
    with _opened(folder, limits) as (config_file, file):
        config = parse_config(config_file.read(limits.config_bytes))
        size = os.fstat(file.fileno()).st_size
        length = header_length(file.read(START_BYTES), size, limits)
        file.seek(LENGTH_BYTES)
        entries = parse_header(file.read(length), size, limits)
    return sum(_bytes_on_device(entry, config, item_bytes) for entry in entries)


def _bytes_on_device(entry: TensorEntry, config: PeftConfig, item_bytes: int) -> int:
    """DoRA's magnitude becomes a float32 scale; QA-LoRA's A is expanded; a tensor of the base is compared only."""
    parsed = parse_key(entry.key)
    if parsed.of_base:
        return 0
    part = parsed.part
    pooling = config.pooling if part == "A" else 1
    return aligned(math.prod(entry.shape) * pooling * (SCALE_BYTES if part == "magnitude" else item_bytes))


@contextmanager
def _opened(folder: AdapterFolder | Path, limits: ReadLimits) -> Iterator[tuple[BufferedReader, BufferedReader]]:
    """Both files of one folder, open; on leaving, a check that neither changed since."""
    try:
        with ExitStack() as stack:
            opened = stack.enter_context(as_folder(folder).opened())
            config = stack.enter_context(_open(opened, CONFIG_FILE, limits.config_bytes))
            weights = stack.enter_context(_open(opened, WEIGHTS_FILE, limits.file_bytes))
            before = [_identity(file) for file in (config, weights)]
            yield config, weights
            for file, was in zip((config, weights), before, strict=True):
                if _identity(file) != was:
                    raise _changed(file)
    except FileNotFoundError:
        raise InvalidAdapter(
            str(folder), f"has no {CONFIG_FILE} any more: the folder is gone", reason="ADAPTER_FILES_MISSING"
        ) from None
    except OSError as error:
        raise InvalidAdapter(
            str(folder), f"cannot be read: {error.strerror or error}", reason="ADAPTER_FILES_UNREADABLE"
        ) from None


def _open(opened: OpenedFolder, name: str, limit: int) -> BufferedReader:
    path = opened.folder.path / name
    try:
        file = open(name, "rb", opener=lambda name, _: opened.open(name))  # noqa: SIM115
    except FileNotFoundError:
        raise InvalidAdapter(name, missing(opened, name), reason="ADAPTER_FILES_MISSING") from None
    except IsADirectoryError:
        raise InvalidAdapter(
            name,
            f"is a folder; the file of that name that PEFT's save_pretrained wrote belongs there ({path})",
            reason="ADAPTER_FILES_UNREADABLE",
        ) from None
    except OSError as error:
        why = "it is a link that leads in a circle" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise InvalidAdapter(name, f"{path} cannot be read: {why}", reason="ADAPTER_FILES_UNREADABLE") from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise InvalidAdapter(name, f"{path} is not a regular file", reason="ADAPTER_FILES_UNREADABLE")
    if status.st_size > limit:
        file.close()
        raise InvalidAdapter(
            name,
            f"has {status.st_size} bytes; the limit is {limit}",
            reason="ADAPTER_TOO_LARGE",
            metadata={"bytes": status.st_size, "limit": limit},
        )
    return file


def _identity(file: BufferedReader) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _start(file: BufferedReader, digest: hashlib._Hash) -> int:
    size = os.fstat(file.fileno()).st_size
    digest.update(os.path.basename(file.name).encode("ascii") + b"\0" + size.to_bytes(8, "little"))
    return size


def _read(file: BufferedReader, digest: hashlib._Hash) -> memoryview:
    """All bytes of an open file, hashed while they are warm."""
    size = _start(file, digest)
    view = memoryview(allocate(size))[:size]
    done = 0
    while done < size:
        count = file.readinto(view[done : done + _CHUNK])
        if not count:
            raise _changed(file)
        digest.update(view[done : done + count])
        done += count
    return view


def _changed(file: BufferedReader) -> InvalidAdapter:
    return InvalidAdapter(
        os.path.basename(file.name),
        "changed while it was read; write adapters to a new folder and rename it into place",
        reason="ADAPTER_FILES_CHANGED",
    )

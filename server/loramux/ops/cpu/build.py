"""Compiles the native operations at first use, once for each source, torch and compiler, and loads them.

The library is on torch's stable ABI, so plain g++ is all it takes; it is kept in the cache folder and, when the
package was installed with it (Docker), beside this file. Each file is compiled for three instruction sets, and which
one runs is decided when it is loaded.

A library is loaded only if its bytes have the sha256 that was written beside it, and only from folders that nobody
else can write to: a damaged one ends the process when it is mapped, and a foreign one is somebody else's code. Where
the cache cannot be used, what is compiled serves this process alone.
"""

from __future__ import annotations

import atexit
import difflib
import errno
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from loramux.cache import cache_root as _cache
from loramux.children import Children
from loramux.errors import StartupError

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]

HERE = Path(__file__).parent
# Instruction sets in rising order; a library built here runs on every x86-64 machine that has the first.
ISAS = {
    "avx2": ("-march=haswell",),
    "avx512": ("-march=icelake-server", "-mprefer-vector-width=512"),
    "amx": ("-march=sapphirerapids", "-mprefer-vector-width=512"),
}
SOURCES = {isa: ("linear_tiles" if isa == "amx" else "linear_vectors", "attention", "elementwise") for isa in ISAS}
_NEEDS = {
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi", "avx512_vnni"},
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16", "avx512_fp16"},
}
# Floating-point comparisons may become selects, or no loop with one vectorizes. Sums keep their order.
_FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden", "-w")
ISA_VARIABLE = "LORAMUX_ISA"
THREADS_VARIABLE = "LORAMUX_THREADS"
_MOST_THREADS = 1024

_SCRATCH = ".compiling-"
_ALONE = "loramux-native-"
_COMPILE_SECONDS = 300.0  # for one file, on a slow and busy machine
_WAIT_SECONDS = 3600.0  # for another process that compiles the same
_LOOK_SECONDS = 0.2


class Unavailable(Exception):
    """The native operations cannot be had here; the text says why."""


def load_native(isa: str = "auto", threads: int | None = None, progress: Progress | None = None) -> str:
    """Build if need be, load, and choose an instruction set; returns its name.

    `isa` "auto" takes $LORAMUX_ISA or the best that this machine has; `progress` is for `compile_to`.
    Raises Unavailable with the reason, and what `wanted_isa` raises.
    """
    wanted = wanted_isa() if isa == "auto" else isa
    if wanted == "none":
        raise Unavailable(f"{ISA_VARIABLE}=none")
    supported = supported_isas()
    if not supported:
        raise Unavailable(f"the processor ({platform.machine()}) has no AVX2")
    if wanted != "auto" and wanted not in supported:
        raise Unavailable(f"{wanted}: this machine supports {', '.join(supported)}")
    if not hasattr(torch.ops.loramux_cpu, "linear"):
        path = library(progress)
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:  # another libc, a file system that runs no programs, …
            raise Unavailable(f"{path} cannot be loaded: {error}") from error
        finally:
            _discard(path)
    choices = [wanted] if wanted != "auto" else list(reversed(supported))
    for choice in choices:
        if torch.ops.loramux_cpu.configure(list(ISAS).index(choice), threads or wanted_threads()):
            return choice
    reason = "the operating system does not hand out the AMX tile registers"
    if isa == "auto" and wanted != "auto":
        raise StartupError(f"{ISA_VARIABLE}={wanted}: {reason}")
    raise Unavailable(reason)


def wanted_isa() -> str:
    """$LORAMUX_ISA: "auto", "none", or an instruction set that this machine has. Raises StartupError for others."""
    wanted = os.environ.get(ISA_VARIABLE) or "auto"
    supported = supported_isas()
    if wanted not in ("auto", "none", *supported):
        here = ", ".join(supported) or "none of them"
        close = difflib.get_close_matches(wanted, ("auto", "none", *ISAS), n=1)
        hint = f"; did you mean {close[0]}?" if close and wanted not in ISAS else ""
        raise StartupError(
            f"{ISA_VARIABLE}={wanted}: it may be auto, none, {', '.join(ISAS)}, and this machine has {here}{hint}"
        )
    return wanted


def supported_isas() -> list[str]:
    """Names of the instruction sets that this processor has, rising."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return [isa for isa, needs in _NEEDS.items() if needs <= flags]


def library(progress: Progress | None = None) -> Path:
    """The compiled library; compiled if it is not there. `progress` is for `compile_to`.

    Raises Unavailable without a compiler, or with one that fails.
    """
    installed = HERE / "libloramux_cpu.so"
    if installed.is_file():
        # As trustworthy as the package's own files; its sum, if there is one, finds a damaged disk or layer.
        if not _sum_file(installed).exists() or _intact(installed):
            return installed
        log.warning("%s is damaged; not using it", installed)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise Unavailable("there is no C++ compiler (install g++)")
    name = f"libloramux_cpu-{_fingerprint(compiler)}.so"
    try:
        return _kept(_cache() / "native" / name, compiler, progress)
    except OSError as error:
        log.warning(
            "the cache folder cannot be used (%s): the native CPU operations are compiled for this process alone, and "
            "again at every start; make the folder usable, or name another in LORAMUX_CACHE",
            error,
        )
    alone: Path | None = None
    try:
        alone = Path(tempfile.mkdtemp(prefix=_ALONE)) / name
        compile_to(alone, compiler, progress=progress)
    except BaseException as error:
        if alone is not None:
            _discard(alone)
        if isinstance(error, OSError):
            raise Unavailable(f"there is no place to compile in: {error.strerror or error}") from error
        raise
    atexit.register(_discard, alone)
    return alone


def _discard(library: Path) -> None:
    """Remove a library that was compiled for this process alone."""
    if library.parent.name.startswith(_ALONE):
        shutil.rmtree(library.parent, ignore_errors=True)


def _kept(target: Path, compiler: str, progress: Progress | None) -> Path:
    """The library in the cache, compiled there if it is missing or damaged.

    Raises OSError if the folder cannot be used or is not safe, Unavailable if the compiler fails.
    """
    folder = target.parent
    if folder.is_dir():
        _check_safe(folder)
        if _intact(target):
            return target
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_safe(folder)
    with _locked(folder / ".lock"):
        if not _intact(target):
            for left in folder.glob(f"{_SCRATCH}*"):  # by one that was killed: who compiles here holds the lock
                shutil.rmtree(left, ignore_errors=True)
            log.info("compiling the native CPU operations, once")
            compile_to(target, compiler, progress=progress)
    return target


def _check_safe(folder: Path) -> None:
    """Raises PermissionError if anybody else could put a library into `folder`, or another folder in its place."""
    for path in (folder, folder.parent, folder.resolve().parent):
        found = path.stat()
        if found.st_uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, f"{path} belongs to another user")
        # A group of one's own is harmless: many systems make all folders so.
        others = stat.S_IWOTH | (stat.S_IWGRP if found.st_gid not in (0, os.getegid()) else 0)
        sticky = path != folder and found.st_mode & stat.S_ISVTX
        if found.st_mode & others and not sticky:
            raise PermissionError(errno.EPERM, f"others may write to {path}; chmod go-w it")


def _intact(library: Path) -> bool:
    """Whether the library is there, is ours, and has the bytes that were written."""
    try:
        with library.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & stat.S_IWOTH:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == _sum_file(library).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return False


def _sum_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Raises OSError if it cannot be made, or if another process holds it for too long."""
    with path.open("w") as lock:
        deadline = time.monotonic() + _WAIT_SECONDS
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "another process holds it for too long") from None
            if not told:
                log.info("another process compiles the native CPU operations; waiting for it")
                told = True
            time.sleep(_LOOK_SECONDS)
        yield


def compile_to(
    target: Path, compiler: str = "g++", extra: tuple[str, ...] = (), progress: Progress | None = None
) -> None:
    """Compile all sources for all instruction sets into the library `target`, with its sha256 in a file beside it.

    `compiler` may have arguments. progress(done, total) is called at the start and after each file. Raises Unavailable
    if the compiler fails, OSError if the folder cannot be written to. Whatever ends this ends the compilers.
    """
    children = Children()
    words = shlex.split(compiler)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=_SCRATCH))
    torch_root = Path(torch.__file__).parent
    # The oldest torch whose stable ABI is used, so that one library serves it and all later ones.
    include = (f"-I{torch_root / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000")
    jobs = [
        (f"{kernel}_{isa}", (*flags, f"-DLORAMUX_SET={isa}", str(HERE / f"{kernel}.cpp")))
        for isa, flags in ISAS.items()
        for kernel in SOURCES[isa]
    ]
    jobs.append(("decoder", (str(HERE / "decoder.cpp"),)))
    jobs.append(("module", (*include, str(HERE / "module.cpp"))))

    def compile_one(job: tuple[str, tuple[str, ...]]) -> Path:
        name, arguments = job
        built = scratch / f"{name}.o"
        _run(children, [*words, *_FLAGS, *extra, *arguments, "-c", "-o", str(built)])
        return built

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, len(jobs))

    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            try:
                objects: list[Path] = []
                tell(0)
                for built in pool.map(compile_one, jobs):
                    objects.append(built)
                    tell(len(objects))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                children.stop()
                raise
        library_path = scratch / "library.so"
        link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lpthread"]
        _run(children, [*words, "-shared", *extra, "-o", str(library_path), *map(str, objects), *link])
        _publish(library_path, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(built: Path, target: Path) -> None:
    """Complete and on disk, or not at all: the sum comes first, and nothing fits it until the library is there."""
    built.chmod(0o644)
    with built.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    written = built.with_name("sum")
    written.write_text(digest + "\n")
    for made, place in ((written, _sum_file(target)), (built, target)):
        if place.is_dir() and not place.is_symlink():  # no file takes a folder's place
            place.rename(made.with_name(f"was-{place.name}"))
        made.rename(place)


def _run(children: Children, command: list[str]) -> None:
    try:
        done = children.run(
            command,
            timeout=_COMPILE_SECONDS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} did not end within {_COMPILE_SECONDS:.0f} s") from None
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error.strerror or error}") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise Unavailable(f"{command[0]} was ended by {name}; is memory short?")
    if done.returncode != 0:
        said = done.stderr.strip()
        log.debug("%s\n%s", shlex.join(command), said)
        if os.strerror(errno.ENOSPC) in said:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        wrong = next((line for line in said.splitlines() if "error" in line), said[-500:])
        raise Unavailable(f"{command[0]} failed: {wrong[:500]}")


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(f"{torch.__version__} {compiler} {_FLAGS} {ISAS} {sys.platform}".encode())
    for source in sorted(HERE.glob("*.cpp")) + sorted(HERE.glob("*.h")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def wanted_threads() -> int:
    """$LORAMUX_THREADS, else one for each core. Raises StartupError for what is no number of threads."""
    cores = max(1, len(os.sched_getaffinity(0)))
    given = os.environ.get(THREADS_VARIABLE) or str(cores)
    if not (given.isascii() and given.isdecimal() and len(given) < 9 and 1 <= int(given) <= _MOST_THREADS):
        raise StartupError(f"{THREADS_VARIABLE}={given}: it is a number from 1 to {_MOST_THREADS}; unset: {cores}")
    return int(given)

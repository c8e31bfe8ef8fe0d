"""A loaded adapter without tensors, and a reader of folders that can be slow or fail."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux.lora.folder import AdapterFolder
from loramux.lora.limits import ReadLimits
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE
from loramux.lora.snapshot import folder_digest


@dataclass(frozen=True)
class FakeAdapter:
    """What a load gives, without tensors."""

    nbytes: int = 10
    digest: str = "sha256:0"
    weights: Mapping[int, Any] = field(default_factory=lambda: {0: object()})
    max_rank: int = 8
    target_modules: tuple[str, ...] = ("q_proj",)
    site_count: int = 1
    warnings: tuple[str, ...] = ()
    chat_template: str | None = None
    mixable: bool = True

    @property
    def on_host(self) -> FakeAdapter:
        return self


class FakeReader:
    """Reads what `put` wrote; the weights file's size is the adapter's.

    While `gate` is clear, reading waits in its thread. `error` is raised instead of a result.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.reads = 0

    def put(self, name: str, content: bytes) -> Path:
        """A folder of the root, whose weights file is `content`."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        (folder / CONFIG_FILE).write_text("{}")
        (folder / WEIGHTS_FILE).write_bytes(content)
        return folder

    def __call__(self, folder: AdapterFolder) -> FakeAdapter:
        self.reads += 1
        assert self.gate.wait(30), "a test forgot to open the gate"
        if self.error is not None:
            raise self.error
        nbytes = (folder.path / WEIGHTS_FILE).stat().st_size
        return FakeAdapter(nbytes, folder_digest(folder, ReadLimits()))

"""Adapters from a Hugging Face hub, where the operator allows it: `hub:ORG/NAME@REVISION`. Imports no torch.

The revision is a commit, not a branch: what is served today is what is served after a restart. Only the adapter's two
files are fetched, once; they stay in a folder of the cache. Which hub, and with which token, is huggingface_hub's
business (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). Runs in a worker.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from loramux.errors import InvalidAdapter, InvalidRequest, PathNotAllowed
from loramux.lora.limits import ReadLimits

PREFIX = "hub:"
_SOURCE = re.compile(r"hub:([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})@([0-9a-f]{40})")


class Hub:
    """`allowed` are patterns of ORG/NAME, e.g. "acme/*"; `cache` is the folder for what was fetched."""

    def __init__(self, allowed: Sequence[str], cache: Path, limits: ReadLimits | None = None) -> None:
        self.cache = cache
        self._allowed = tuple(allowed)
        self._limits = limits or ReadLimits()

    def fetch(self, source: str, files: Sequence[str]) -> Path:
        """The folder with the adapter's `files`, fetched if it is not there.

        Raises what `place` does, and InvalidAdapter for one that cannot be had or is too large.
        """
        repository, revision = self.place(source)
        folder = self.cache / f"{repository.replace('/', '--')}@{revision}"
        for file in files:
            if not (folder / file).is_file():
                self._download(repository, revision, file, folder)
        return folder

    def place(self, source: str) -> tuple[str, str]:
        """Repository and revision that `source` names; nothing is fetched.

        Raises InvalidRequest for a source of another form, PathNotAllowed for a repository that no pattern allows.
        """
        match = _SOURCE.fullmatch(source)
        if match is None:
            raise InvalidRequest(
                "source",
                f"{source[:200]!r} is not of the form hub:ORG/NAME@REVISION; the revision is a commit of 40 "
                "hexadecimal digits, so that every start gets the same files",
            )
        repository, revision = match.groups()
        if not any(fnmatch.fnmatchcase(repository, pattern) for pattern in self._allowed):
            listed = ", ".join(self._allowed) or "(none)"
            raise PathNotAllowed(
                f"{repository!r} is not among the hub repositories that adapters may come from: {listed}; start the "
                "server with another --adapter-hub",
                metadata={"repository": repository},
            )
        return repository, revision

    def _download(self, repository: str, revision: str, file: str, folder: Path) -> None:
        # Here, for it takes a second to import and most servers never need it.
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            size = get_hf_file_metadata(hf_hub_url(repository, file, revision=revision)).size
            if size is not None and size > self._limits.file_bytes:
                raise InvalidAdapter(
                    file,
                    f"of {repository} has {size} bytes; the limit is {self._limits.file_bytes}",
                    reason="ADAPTER_TOO_LARGE",
                )
            hf_hub_download(repository, file, revision=revision, local_dir=folder)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            said = str(error).strip().splitlines()
            raise InvalidAdapter(
                "source",
                f"{file} of {repository}@{revision} cannot be had: {said[0] if said else type(error).__name__}",
                reason="ADAPTER_FILES_MISSING",
            ) from None

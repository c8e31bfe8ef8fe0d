"""Where MergeAdapter may write: new folders under the one root that the operator gave. Imports no torch.

It touches the file system, so it runs in a worker.
"""

from __future__ import annotations

import os
from pathlib import Path

from loramux.errors import InvalidRequest, PathNotAllowed
from loramux.lora.roots import NAME_RULE, check_path, is_name


class MergeRoot:
    """`path`: --merge-dir; None where there is none, and then nothing may be written. Immutable."""

    def __init__(self, path: Path | None) -> None:
        self._root = None if path is None else Path(os.path.realpath(path))

    def resolve(self, output: str) -> Path:
        """The real path of the new folder that `output` names: absolute, or relative to the root.

        `..` and symbolic links are resolved before the check. Whether something is there already is for the writer to
        find out. Raises InvalidRequest for text that names no folder, PathNotAllowed for a place outside the root.
        """
        check_path(output, "output", "name a new folder under the server's --merge-dir")
        if self._root is None:
            raise PathNotAllowed(
                "this server writes no merged models: start it with --merge-dir, or run `loramux merge` beside it",
                reason="MERGE_DIR_NOT_SET",
            )
        path = self._root / output
        if not is_name(path.name):
            raise InvalidRequest("output", f"{output!r} must end in a new folder's name; {NAME_RULE}")
        parent = Path(os.path.realpath(path.parent))
        if not parent.is_relative_to(self._root) or path == self._root:
            raise PathNotAllowed(
                f"{output!r} leads outside --merge-dir ({self._root}) once `..` and symbolic links are resolved",
                metadata={"path": output},
            )
        return parent / path.name

"""The adapters file: which adapters a server should have, as YAML that replicas share. Imports no torch.

    adapters:
      - name: sql                # what clients say
        source: sql/v3           # a folder under an adapter root; the name itself if left out
        digest: sha256:…         # refuse anything else; left out: whatever lies there
        pin: true                # load it now and keep it in memory; left out: load it when it is first asked for

The file says all there should be of what it manages: what was in it and is not any more is unloaded, what has another
source or digest is replaced. Adapters that were loaded by hand, or that lie under a root, are not its business unless
it names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loramux.errors import InvalidRequest, LoramuxError
from loramux.lora.roots import check_name

_MOST_BYTES = 16 << 20


class Declared(BaseModel):
    """One adapter of the file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    name: str
    source: Annotated[str, Field(max_length=4096)] = ""
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    pin: bool = False


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    adapters: list[Declared] = []


def read_manifest(path: Path) -> Mapping[str, Declared]:
    """The adapters that `path` declares, by name.

    Raises InvalidRequest that names the place and what is wrong with it.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _wrong(path, f"is larger than {_MOST_BYTES >> 20} MiB")
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise _wrong(path, f"is not YAML: {' '.join(str(error).split())}") from None
    try:
        file = _File.model_validate(content if content is not None else {})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)[:8]]
        raise _wrong(path, "; ".join(problems)) from None
    declared: dict[str, Declared] = {}
    for i, adapter in enumerate(file.adapters):
        try:
            check_name(adapter.name, field=f"adapters.{i}.name")
        except LoramuxError as error:
            raise _wrong(path, error.message) from None
        if adapter.name in declared:
            raise _wrong(path, f"adapters.{i}.name: {adapter.name!r} is there twice")
        declared[adapter.name] = adapter
    return declared


def _wrong(path: Path, what: str) -> InvalidRequest:
    return InvalidRequest("adapters_file", f"{path}: {what}", reason="INVALID_ADAPTERS_FILE")

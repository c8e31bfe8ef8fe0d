"""What `--model` names, as far as can be told without reading it. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from loramux.errors import StartupError
from loramux.model.embedded import EMBEDDED


def local_place(model: str) -> Path | None:
    """The folder or .gguf file that `model` is; None for an embedded model and for a hub id.

    Raises StartupError with the way out for what is none of these.
    """
    if model in EMBEDDED:
        return None
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise StartupError(f"{model}: there is no config.json in it; is it a Hugging Face model folder?")
            return path
        if path.is_file():
            if path.suffix != ".gguf":
                raise StartupError(
                    f"{model}: a model is a Hugging Face folder or id, a .gguf file, or one of {names()}"
                )
            return path
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise StartupError(f"--model: cannot look at {model}: {error}") from error
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return None
    raise StartupError(f"{model}: no such folder or file, and no embedded model of that name ({names()})")


def names() -> str:
    """Those of the embedded models."""
    return ", ".join(sorted(EMBEDDED))

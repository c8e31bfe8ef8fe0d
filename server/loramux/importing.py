"""Importing torch and transformers: a million objects that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Nothing is collected while these imports are made, and what they made is never looked at again.

    Collections that walk it, during the imports and when the process ends, take a third of their time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()

"""What the modules inside the model look at during one forward pass."""

from __future__ import annotations

from collections.abc import Callable

from loramux.ops.backend import Backend
from loramux.ops.paged import AttentionShape, LayerCache, PagedBatch


class Step:
    """One object a model, shared by its sites and attention layers. `Model.forward` sets it and clears it.

    The skeleton's own forward methods know nothing of segments or pages, so these travel beside their arguments.
    Owned by the thread that runs the model.
    """

    __slots__ = ("attention_calls", "attention_shapes", "backend", "batch", "caches", "make_cache", "segments")

    def __init__(self, backend: Backend, make_cache: Callable[[int, int, int], LayerCache]) -> None:
        self.backend = backend
        self.segments = backend.bind(())
        self.batch: PagedBatch | None = None
        self.caches: dict[int, LayerCache] = {}
        self.make_cache = make_cache
        self.attention_calls: dict[int, int] = {}
        self.attention_shapes: dict[int, AttentionShape] = {}  # what each layer last asked for

"""What an adapter's files are compared with, beside the base's sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """What is known of a base.

    name           as it was asked for: a hub id, a folder, a file, or an embedded model's name
    chat_template  its own; None if it has none or none is known
    check_template raises InvalidAdapter for an adapter's own that cannot be used; None: they are not used
    dense          its tensors that no adapter changes (embeddings, norms, the output head), by name
    """

    name: str = ""
    chat_template: str | None = None
    check_template: Callable[[str], None] | None = None
    dense: Mapping[str, Tensor] = field(default_factory=dict)


NOTHING_KNOWN = Base()

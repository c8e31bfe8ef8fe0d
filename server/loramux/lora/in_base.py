"""An adapter that is in the base's weights already: requests lease it like any other, and it has no branch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramux.lora.peft_files import AdapterFiles
from loramux.ops.segment import AdapterWeights


@dataclass(frozen=True, slots=True, eq=False)
class AdapterInBase:
    """What a load gives in place of lora.adapter.Adapter. `files` were merged when the base was loaded.

    weights  no factors at any of the base's sites
    """

    files: AdapterFiles
    weights: AdapterWeights

    @classmethod
    def of(cls, files: AdapterFiles, sites: int, dtype: torch.dtype) -> AdapterInBase:
        """For a base with that many sites, which computes in `dtype`."""
        offsets = torch.full((sites, 4), -1, dtype=torch.int64)
        ranks = torch.zeros(sites, dtype=torch.int32)
        return cls(files, AdapterWeights(torch.empty(0, dtype=dtype), offsets, ranks, {}))

    @property
    def nbytes(self) -> int:
        """Bytes of its own."""
        return 0

    @property
    def on_host(self) -> AdapterInBase:
        """There is nothing to keep."""
        return self

    @property
    def mixable(self) -> bool:
        """What it added cannot be weighted any more."""
        return False

    @property
    def digest(self) -> str:
        """Of its files, as they were merged."""
        return self.files.digest

    @property
    def max_rank(self) -> int:
        """The largest rank of its sites."""
        return max(f.rank for f in self.files.factors)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Module names that it changed."""
        return tuple(sorted({f.site.name.rpartition(".")[2] for f in self.files.factors}))

    @property
    def warnings(self) -> tuple[str, ...]:
        """See AdapterFiles."""
        return self.files.warnings

    @property
    def chat_template(self) -> str | None:
        """See AdapterFiles."""
        return self.files.chat_template

    @property
    def site_count(self) -> int:
        """Linear layers that it changed."""
        return len(self.files.factors)

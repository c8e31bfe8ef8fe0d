"""What a server refuses that was started with `--merged NAME`: its weights are that adapter's, and no other's."""

from __future__ import annotations

from collections.abc import Sequence

from loramux.errors import AdapterUnavailable


class MergedOnly:
    """`name`: the adapter that is merged into the base; empty for an ordinary server, which refuses nothing here."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def check_request(self, wanted: Sequence[tuple[str, float]]) -> None:
        """Raise AdapterUnavailable unless the merged weights answer what is `wanted`: (name, weight) of each adapter.

        The empty list asks for the base, which is not here either: it is never answered by something else.
        """
        if not self.name or list(wanted) == [(self.name, 1.0)]:
            return
        if not wanted:
            what = "the base model alone is not here"
        elif len(wanted) == 1 and wanted[0][0] == self.name:
            what = f"its weight is 1 and cannot be {wanted[0][1]:g}"
        else:
            what = f"it cannot answer for {' + '.join(repr(name) for name, _ in wanted)}"
        raise self._refusal(f"{what}; ask for adapter {self.name!r}, or a server without --merged")

    def check_change(self) -> None:
        """Raise AdapterUnavailable where adapters come and go with the process only."""
        if self.name:
            raise self._refusal("it loads and unloads no adapters; start one without --merged for that")

    def _refusal(self, why: str) -> AdapterUnavailable:
        return AdapterUnavailable(
            f"this server has adapter {self.name!r} merged into its weights: {why}",
            reason="MERGED_SERVER",
            metadata={"merged": self.name},
        )

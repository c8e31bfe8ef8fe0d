"""What a merge did and how exact it is: merge_report.json of a merged folder. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

MERGE_REPORT = "merge_report.json"


@dataclass(frozen=True, slots=True)
class LayerError:
    """One changed layer. Frobenius norms over all its weights, summed in fp64: ‖W' − (W + ΔW)‖, ‖ΔW‖ and ‖W‖.

    W' is what was written, W the dequantized base, ΔW the whole change: of DoRA, what it does to the rows' norms too.
    """

    layer: str
    error_norm: float
    delta_norm: float
    base_norm: float

    @property
    def error(self) -> float:
        """‖W' − (W + ΔW)‖ / ‖ΔW‖; infinite where the delta is zero and rounding is not."""
        if self.delta_norm == 0:
            return 0.0 if self.error_norm == 0 else math.inf
        return self.error_norm / self.delta_norm


@dataclass(frozen=True, slots=True)
class MergeTerm:
    """An adapter that went in."""

    name: str
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """A whole merge. `bytes` are those of all tensors; `created_biases` the layers that had no bias before."""

    model: str
    adapters: tuple[MergeTerm, ...]
    dtype: str
    bytes: int
    layers: tuple[LayerError, ...]
    created_biases: tuple[str, ...]

    @property
    def overall(self) -> float:
        """The error over all changed layers together."""
        error, delta = (math.hypot(*(getattr(x, n) for x in self.layers)) for n in ("error_norm", "delta_norm"))
        return LayerError("", error, delta, 0.0).error

    @property
    def worst(self) -> LayerError:
        """The changed layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.error)

    def summary(self) -> dict[str, Any]:
        """The fields of rpc.ports.MergeDone, but the place."""
        return {
            "bytes": self.bytes,
            "layers": len(self.layers),
            "overall_error": self.overall,
            "worst_error": self.worst.error,
            "worst_layer": self.worst.layer,
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null stands for it."""
        return asdict(self) | {
            "overall_error": _finite(self.overall),
            "worst_layer": self.worst.layer,
            "worst_error": _finite(self.worst.error),
            "layers": [asdict(x) | {"error": _finite(x.error)} for x in self.layers],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

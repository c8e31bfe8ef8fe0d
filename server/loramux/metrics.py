"""Every metric of the server, declared once.

Names that gateways and dashboards already read (`vllm:…`) keep their names and labels; everything else is
`loramux_…`. What the engine and the adapter store count themselves is read from one `Snapshot` when somebody
scrapes; only what exists nowhere else (latencies, per-adapter counts, rejections) is counted here. Each Metrics has
a registry of its own: no global state. All methods may be called from any thread. Knows nothing of HTTP and gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from loramux.engine.request import Delta, Request, SequenceFinished
from loramux.engine.stats import EngineStats
from loramux.errors import LoramuxError

MAX_ADAPTER_LABELS = 256
OTHER_ADAPTERS = "_other"

_FIRST_TOKEN = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0)
_BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_WHOLE = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

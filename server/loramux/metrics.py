"""Every metric of the server, declared once.

Names that gateways and dashboards already read (`vllm:…`) keep their names and labels; everything else is
`loramux_…`. What the engine and the adapter registry count themselves comes from one `Snapshot`, taken when somebody
scrapes; only what exists nowhere else (latencies, per-adapter counts, rejections, loads) is counted here. Each
Metrics has a registry of its own, so there is no global state. Methods may be called from any thread. Knows nothing
of HTTP, gRPC, the engine or the adapter registry: `rpc.telemetry` connects them.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loramux import __version__

MAX_ADAPTER_LABELS = 256
MIN_IDLE = 20
OTHER_ADAPTERS = "_other"
FINISHED_REASONS = ("stop", "length", "abort", "error")

_TTFT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0)
_ITL = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_E2E = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the engine and the adapter registry say of themselves. Gauges are of one moment, the rest counts up.

    `adapter_states` and `adapter_residencies` count adapters; `adapter_lookups` counts where adapters were when
    requests asked for them; the two sequences name adapters of running and waiting requests.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    block_size: int = 0
    healthy: bool = True
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    max_adapters_at_once: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    faults: int = 0
    steps: int = 0
    late_compilations: int = 0
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    adapter_states: Mapping[str, int] = field(default_factory=dict)
    adapter_residencies: Mapping[str, int] = field(default_factory=dict)
    adapter_lookups: Mapping[str, int] = field(default_factory=dict)
    adapter_evictions: int = 0
    adapter_bytes: int = 0
    adapter_budget_bytes: int = 0
    adapter_host_bytes: int = 0
    adapter_host_budget_bytes: int = 0
    waiting_for_adapters: int = 0
    adapter_leases: int = 0


class Metrics:
    """Counts, and renders. Until a source is set, the snapshot is empty.

    Gateways scrape every 50 ms and want the snapshot as it is now. What is counted here is more text, so it is
    rendered anew only when its age exceeds MIN_IDLE times what rendering took: at most 5 % of a core. `clock` is in
    seconds.
    """

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.registry = CollectorRegistry()
        self._live = CollectorRegistry()
        self._model = model
        self._scrape = _Scrape(model)
        self._live.register(self._scrape)
        self._adapters = _AdapterCounts()
        self.registry.register(self._adapters)
        self._rendering = threading.Lock()
        self._rendered = b""
        self._stale_at = 0.0

        ProcessCollector(registry=self.registry)
        build = Info("loramux_build", "What runs here.", registry=self.registry)
        build.info({"version": __version__, "python": platform.python_version()})

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

        of_model = {"model_name": model}
        self._prompt_tokens = counter(
            "vllm:prompt_tokens",
            "Prompt tokens, those found in the prefix cache included; counted when a request's first token comes.",
            "model_name",
        ).labels(**of_model)
        self._generation_tokens = counter(
            "vllm:generation_tokens",
            "Generated tokens, counted as each is handed to its request's stream or answer, however the request ends "
            "later. What is generated after the reader has gone is dropped and not counted.",
            "model_name",
        ).labels(**of_model)
        self._success = counter(
            "vllm:request_success",
            "Requests that the engine took and that ended: stop and length are whole answers; abort is a cancelled "
            "request, a passed deadline, a slow reader or a shutdown; error is a failure.",
            "model_name",
            "finished_reason",
        )
        for finished_reason in FINISHED_REASONS:  # there from the start: a rate needs a zero to begin at
            self._success.labels(model_name=model, finished_reason=finished_reason)
        self._outcomes = counter(
            "loramux_request_outcomes",
            "Requests to generate, each counted once, when it ends, by the gRPC status that its caller got and why: "
            "stop or length for a whole answer, else the error's reason. Refused requests count too, but for messages "
            "so large that gRPC refuses them unseen.",
            "status",
            "reason",
        )
        self._ttft = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _TTFT, "model_name"
        ).labels(**of_model)
        self._itl = histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", _ITL, "model_name"
        ).labels(**of_model)
        self._e2e = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token, of whole answers.", _E2E, "model_name"
        ).labels(**of_model)
        self._queue = histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step, of whole answers.", _TTFT, "model_name"
        ).labels(**of_model)
        self._adapter_wait = histogram(
            "loramux_request_adapter_load_seconds", "Waiting for the adapter's weights, of whole answers.", _TTFT
        )
        self._rejected = counter(
            "loramux_requests_failed",
            "RPCs of any service that the server ended with an error, by its reason. Not what callers cancelled.",
            "reason",
        )
        self._load_seconds = histogram(
            "loramux_adapter_load_seconds", "Reading, validating and placing an adapter.", _TTFT
        )
        self._load_failures = counter("loramux_adapter_load_failures", "Loads that failed, by reason.", "reason")
        self._unloads = counter("loramux_adapter_unloads", "Adapters that were freed.")

    def set_source(self, source: Callable[[], Snapshot]) -> None:
        """Where snapshots come from; called at each scrape, on the scraping thread."""
        self._scrape.source = source

    def set_known(self, known: Callable[[str], bool]) -> None:
        """Which adapters there are: only those get a label. Called on the threads that count."""
        self._adapters.known = known

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self._live) + self._counted()

    def _counted(self) -> bytes:
        with self._rendering:
            started = self._clock()
            if started >= self._stale_at:
                self._rendered = generate_latest(self.registry)
                ended = self._clock()
                self._stale_at = ended + MIN_IDLE * (ended - started)
            return self._rendered

    def prompt_computed(self, tokens: int, seconds: float) -> None:
        """A request's first token came, `seconds` after its arrival: its prompt is computed."""
        self._prompt_tokens.inc(tokens)
        self._ttft.observe(seconds)

    def token_gap(self, seconds: float) -> None:
        """Two deliveries of one sequence lay this far apart."""
        self._itl.observe(seconds)

    def delivered(self, tokens: int, adapters: tuple[str, ...]) -> None:
        """Tokens went to a request's reader. `adapters` are names that the registry resolved, never a client's text."""
        self._generation_tokens.inc(tokens)
        for name in adapters:
            self._adapters.add(name, tokens=tokens)

    def ended(self, status: str, reason: str, adapters: tuple[str, ...]) -> None:
        """A request to generate has ended; called once for each. `adapters` as in `delivered`."""
        self._outcomes.labels(status=status, reason=reason).inc()
        for name in adapters:
            self._adapters.add(name, requests=1)

    def left_the_engine(self, finished_reason: str) -> None:
        """A request that the engine took has ended, with one of FINISHED_REASONS."""
        self._success.labels(model_name=self._model, finished_reason=finished_reason).inc()

    def answered(self, *, total_seconds: float, queue_seconds: float, adapter_seconds: float | None) -> None:
        """A request got its whole answer; `adapter_seconds` is None without adapters."""
        self._e2e.observe(total_seconds)
        self._queue.observe(queue_seconds)
        if adapter_seconds is not None:
            self._adapter_wait.observe(adapter_seconds)

    def failed(self, reason: str) -> None:
        """An RPC ended with an error."""
        self._rejected.labels(reason=reason).inc()

    def adapter_loaded(self, seconds: float) -> None:
        """An adapter became ready."""
        self._load_seconds.observe(seconds)

    def adapter_failed(self, reason: str) -> None:
        """A load failed."""
        self._load_failures.labels(reason=reason).inc()

    def adapter_unloaded(self) -> None:
        """An adapter was freed."""
        self._unloads.inc()

    def forget_adapter(self, name: str) -> None:
        """No adapter has this name any more: its counts go, and their place is free for another's."""
        self._adapters.forget(name)


class _AdapterCounts(Collector):
    """Requests and tokens by adapter; when too many have a label already, under `_other`.

    There, too, counts what the last requests of an adapter add when its name is forgotten already (not `known`).
    """

    def __init__(self) -> None:
        self.known: Callable[[str], bool] = lambda _: True
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[int, int]] = {}

    def add(self, name: str, *, requests: int = 0, tokens: int = 0) -> None:
        with self._lock:
            if name not in self._counts and not self._may_be_named(name):
                name = OTHER_ADAPTERS
            requests_before, tokens_before = self._counts.get(name, (0, 0))
            self._counts[name] = (requests_before + requests, tokens_before + tokens)

    def _may_be_named(self, name: str) -> bool:
        named = len(self._counts) - (OTHER_ADAPTERS in self._counts)
        return named < MAX_ADAPTER_LABELS and self.known(name)

    def forget(self, name: str) -> None:
        with self._lock:
            self._counts.pop(name, None)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            counts = dict(self._counts)
        requests = CounterMetricFamily(
            "loramux_adapter_requests",
            "Requests that have ended, in any way, by the adapter they used.",
            labels=("adapter",),
        )
        tokens = CounterMetricFamily(
            "loramux_adapter_generated_tokens",
            "Generated tokens by adapter, counted as vllm:generation_tokens_total is.",
            labels=("adapter",),
        )
        for name, (count, generated) in counts.items():
            requests.add_metric((name,), count)
            tokens.add_metric((name,), generated)
        yield requests
        yield tokens


class _Scrape(Collector):
    """Turns a snapshot into metrics at scrape time."""

    def __init__(self, model: str) -> None:
        self.source: Callable[[], Snapshot] = Snapshot
        self._model = model

    def describe(self) -> list[Metric]:
        return []  # no collision check needs a snapshot at start

    def collect(self) -> Iterator[Metric]:
        now = self.source()
        yield self._gauge("vllm:num_requests_running", "Requests in the batch.", now.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", now.waiting)
        share = now.kv_blocks_used / now.kv_blocks_total if now.kv_blocks_total else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", share)
        yield self._count("vllm:prefix_cache_queries", "Prompt tokens looked up.", now.prefix_query_tokens)
        yield self._count("vllm:prefix_cache_hits", "Prompt tokens found.", now.prefix_hit_tokens)
        yield self._count("vllm:num_preemptions", "Sequences put back into the queue.", now.preemptions)
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        lora.add_metric(
            (str(now.max_adapters_at_once), ",".join(now.running_adapters), ",".join(now.waiting_adapters)),
            time.time(),
        )
        yield lora
        cache = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=("block_size", "num_gpu_blocks"))
        cache.add_metric((str(now.block_size), str(now.kv_blocks_total)), 1)
        yield cache
        yield GaugeMetricFamily("loramux_healthy", "1: serves; 0: the engine failed.", now.healthy)
        yield CounterMetricFamily(
            "loramux_engine_faults", "Faults that ended a request, or all requests of a step.", now.faults
        )
        yield CounterMetricFamily("loramux_steps", "Forward passes.", now.steps)
        yield CounterMetricFamily(
            "loramux_late_compilations",
            "GPU kernels compiled or loaded, and CUDA graphs recorded, after the server was ready: each halts all "
            "streams. Should stay 0.",
            now.late_compilations,
        )
        parts = CounterMetricFamily("loramux_step_seconds", "Time in steps, by part.", labels=("part",))
        for part, seconds in now.step_seconds.items():
            parts.add_metric((part,), seconds)
        yield parts
        states = GaugeMetricFamily("loramux_adapters", "Adapters, by state.", labels=("state",))
        for state, count in now.adapter_states.items():
            states.add_metric((state,), count)
        yield states
        residencies = GaugeMetricFamily("loramux_adapter_residency", "Adapters, by where they are.", labels=("tier",))
        for tier, count in now.adapter_residencies.items():
            residencies.add_metric((tier,), count)
        yield residencies
        lookups = CounterMetricFamily(
            "loramux_adapter_lookups", "Where adapters were when requests asked for them.", labels=("tier",)
        )
        for tier, count in now.adapter_lookups.items():
            lookups.add_metric((tier,), count)
        yield lookups
        yield CounterMetricFamily("loramux_adapter_evictions", "Adapters put out of the device.", now.adapter_evictions)
        yield GaugeMetricFamily("loramux_adapter_host_bytes", "Adapters in host memory only.", now.adapter_host_bytes)
        yield GaugeMetricFamily("loramux_adapter_host_budget_bytes", "Most of them.", now.adapter_host_budget_bytes)
        yield GaugeMetricFamily(
            "loramux_requests_waiting_for_adapters", "Requests without their turn yet.", now.waiting_for_adapters
        )
        yield GaugeMetricFamily("loramux_adapter_bytes", "Adapters on the device.", now.adapter_bytes)
        yield GaugeMetricFamily("loramux_adapter_budget_bytes", "Most of them.", now.adapter_budget_bytes)
        yield GaugeMetricFamily("loramux_adapter_leases", "Leases of requests.", now.adapter_leases)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _count(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

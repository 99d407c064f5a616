"""Every metric name, once. Counters and gauges are read from the engines' last reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from workers.wire import Engine, Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ENGINE = ("model", "replica")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

GAUGES: Mapping[str, tuple[str, Callable[[Load], float]]] = {
    "moeray_num_requests_running": ("Sequences in the batch", lambda load: load.running),
    "moeray_num_requests_waiting": ("Sequences that wait for a slot", lambda load: load.waiting),
    "moeray_queued_tokens": ("Prompt tokens not computed yet", lambda load: load.queued_tokens),
    "moeray_kv_blocks_total": ("KV blocks in the pool", lambda load: load.blocks),
    "moeray_kv_blocks_free": ("KV blocks free or evictable", lambda load: load.free),
    "moeray_batch_tokens": ("Tokens in the last step", lambda load: load.batch_tokens),
    "moeray_expert_imbalance": (
        "Tokens of the busiest rank over the mean, averaged over layers, since the engine's start",
        lambda load: load.expert_imbalance,
    ),
    "moeray_progress_age_seconds": (
        "Since a step ended; 0 while idle",
        lambda load: load.progress_ms / 1000,
    ),
}
COUNTERS: Mapping[str, tuple[str, Callable[[Load], float]]] = {
    "moeray_steps": ("Steps run", lambda load: load.steps),
    "moeray_num_preemptions": ("Sequences preempted", lambda load: load.preemptions),
    "moeray_prompt_tokens": ("Prompt tokens admitted", lambda load: load.prompt_tokens),
    "moeray_generation_tokens": ("Tokens generated", lambda load: load.generated_tokens),
    "moeray_prefix_cache_queries": (
        "Prompt tokens looked up in the prefix cache",
        lambda load: load.prefix_queries,
    ),
    "moeray_prefix_cache_hits": (
        "Prompt tokens found in the prefix cache",
        lambda load: load.prefix_hits,
    ),
}


class Metrics:
    """What one ingress measures itself, and what its engines last reported."""

    def __init__(self, loads: Callable[[], Iterable[tuple[Engine, Load]]]) -> None:
        self._loads = loads
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.first_token = Histogram(
            "moeray_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.between_tokens = Histogram(
            "moeray_inter_token_latency_seconds",
            "Between two deliveries of tokens of one request",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.whole = Histogram(
            "moeray_e2e_request_latency_seconds",
            "From the request's arrival to its last token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.responses = Counter(
            "moeray_http_responses", "Answers by status", ["status"], registry=self._registry
        )

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry: the engines' numbers."""
        loads = [(engine.model, engine.replica, load) for engine, load in self._loads()]
        for name, (help, read) in GAUGES.items():
            gauge = GaugeMetricFamily(name, help, labels=_ENGINE)
            for model, replica, load in loads:
                gauge.add_metric([model, replica], read(load))
            yield gauge
        for name, (help, read) in COUNTERS.items():
            counter = CounterMetricFamily(name, help, labels=_ENGINE)
            for model, replica, load in loads:
                counter.add_metric([model, replica], read(load))
            yield counter
        used = GaugeMetricFamily(
            "moeray_kv_blocks_used", "KV blocks held by requests", labels=[*_ENGINE, "group"]
        )
        calls = CounterMetricFamily(
            "moeray_expert_calls", "(token, expert) pairs computed", labels=[*_ENGINE, "rank"]
        )
        finished = CounterMetricFamily(
            "moeray_request_success", "Requests ended", labels=[*_ENGINE, "finished_reason"]
        )
        for model, replica, load in loads:
            for group in load.groups:
                used.add_metric([model, replica, group.name], group.used)
            for rank, count in enumerate(load.expert_calls):
                calls.add_metric([model, replica, str(rank)], count)
            for reason, count in load.finished.items():
                finished.add_metric([model, replica, reason], count)
        yield from (used, calls, finished)

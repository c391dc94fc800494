"""The metrics that all processes share: their names, labels and help, and their families.

A new counter stands in COUNTERS, and `Metrics._counters` yields its value; a new gauge in GAUGES,
and `Metrics._gauges` does. docs/metrics.md lists them all.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from embedding_proxy.providers.histogram import BOUND_NAMES
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from .shared_counters import Totals

PREFIX = "embedding_proxy_"
CACHE_DURATION = "cache_request_duration_seconds"
COUNTERS = {
    "requests_total": (("route", "status"), "Requests answered, by route and status."),
    "cache_lookups_total": (("result",), "Inputs looked up, by the tier that had them."),
    "cache_corrupt_records_total": ((), "Records that did not verify."),
    "cache_evictions_total": ((), "Entries that were evicted from disk."),
    "shared_lookups_total": (("result",), "Inputs asked of the shared tier, by what it had."),
    "shared_corrupt_records_total": ((), "Records of the shared tier that did not verify."),
    "shared_writes_total": (("result",), "Records for the shared tier, by what became of them."),
    "shared_exchanges_total": (("result",), "Exchanges with the servers of the shared tier."),
    "shared_exchange_seconds_total": ((), "Time of the exchanges that ended well."),
    "shared_breaker_openings_total": ((), "How often the shared tier was left alone."),
    "provider_attempts_total": (("provider",), "Calls of providers."),
    "provider_failures_total": (("provider", "reason"), "Calls that failed, by reason."),
    "provider_model_mismatch_total": (
        ("provider", "model"),
        "Replies that named another model than was asked for, by that name.",
    ),
    "circuit_breaker_openings_total": (("provider",), "How often a circuit breaker has opened."),
    "retries_total": (("model",), "Further attempts at the same route."),
    "failovers_total": (("model",), "Attempts at a further route."),
    "hedged_requests_total": (
        ("model",),
        "Batches sent to a second route while the first had not answered.",
    ),
    "index_points_total": (("result",), "Points, by what became of them."),
    "index_failures_total": ((), "Failed attempts to send points."),
    "index_outbox_corruptions_total": ((), "Damage found in what waits on disk."),
}
"""Counters that are shared: their labels, and their help."""
HISTOGRAMS = {
    CACHE_DURATION: (
        "result",
        "Time until the reply to a request for embeddings is ready, by how the cache answered it.",
    ),
    "request_duration_seconds": ("route", "Time until the reply to a request is ready."),
    "upstream_duration_seconds": ("provider", "Time of one call of a provider."),
}
GAUGES: dict[str, tuple[tuple[str, ...], str, Callable[[list[float]], float]]] = {
    "requests_in_flight": ((), "Requests that are being answered.", sum),
    "cache_unwritten_records": ((), "Records that wait to be written to disk.", sum),
    "shared_queued_records": ((), "Records that wait to be written to the shared tier.", sum),
    "shared_breaker_state": ((), "Circuit breaker of the shared tier: 0 closed, 2 open.", max),
    "provider_ready": (("provider",), "Whether a provider is asked as usual.", min),
    "circuit_breaker_state": (
        ("provider",),
        "The worst circuit breaker of a provider: 0 closed, 1 half-open, 2 open.",
        max,
    ),
    "provider_cooldown_seconds": (
        ("provider",),
        "The longest cooldown of a provider that is left.",
        max,
    ),
}
"""Gauges that are shared: their labels, their help, and how the values of several processes become
one."""


class _Sample(NamedTuple):
    labels: tuple[tuple[str, str], ...]
    value: float


def families_of(totals: Totals) -> Iterator[Metric]:
    """Yield what all processes have published, family by family, as far as there is any."""
    counters: dict[str, list[_Sample]] = {}
    for (name, labels), value in totals.counters.items():
        counters.setdefault(name, []).append(_Sample(labels, value))
    for name, (label_names, text) in COUNTERS.items():
        family = CounterMetricFamily(PREFIX + name, text, labels=label_names)
        yield from _filled(family, label_names, counters.get(name, []))
    gauges: dict[str, list[_Sample]] = {}
    for (name, labels), values in totals.gauges.items():
        if name in GAUGES:
            gauges.setdefault(name, []).append(_Sample(labels, GAUGES[name][2](values)))
    for name, (label_names, text, _) in GAUGES.items():
        yield from _filled(
            GaugeMetricFamily(PREFIX + name, text, labels=label_names),
            label_names,
            gauges.get(name, []),
        )
    for name, (label, text) in HISTOGRAMS.items():
        yield from _histogram(name, text, label, counters)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily,
    label_names: tuple[str, ...],
    samples: list[_Sample],
) -> Iterator[Metric]:
    """Yield a family; samples with other labels, as another version may have had, are left out."""
    for labels, value in sorted(samples):
        if tuple(label for label, _ in labels) == label_names:
            family.add_metric([label for _, label in labels], value)
    if family.samples:
        yield family


def _histogram(
    name: str, text: str, label: str, counters: Mapping[str, list[_Sample]]
) -> Iterator[Metric]:
    """Yield a histogram, whose buckets each hold those below, as Prometheus wants it."""
    counts: dict[str, dict[str, float]] = {}
    for labels, value in counters.get(f"{name}_bucket", ()):
        found = dict(labels)
        if found.keys() == {label, "le"}:
            counts.setdefault(found[label], {})[found["le"]] = value
    sums = {dict(labels).get(label): value for labels, value in counters.get(f"{name}_sum", ())}
    family = HistogramMetricFamily(PREFIX + name, text, labels=[label])
    for label_value, by_bound in sorted(counts.items()):
        totals = accumulate(by_bound.get(bound, 0.0) for bound in BOUND_NAMES)
        buckets = [*zip(BOUND_NAMES, totals, strict=True)]
        family.add_metric([label_value], buckets, sum_value=sums.get(label_value, 0.0))
    if family.samples:
        yield family

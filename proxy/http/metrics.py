"""GET /metrics: what Prometheus is told, of all processes that share the cache folder.

The sums of the ledger are the store's. All other counters are those of SharedCounters: any process
tells the same totals, which survive restarts. Gauges are of the processes that are alive.
prometheus_client renders the page.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeAlias

from aiohttp import web
from embedding_proxy.cache.ledger import By
from embedding_proxy.cache.maintenance.stats import read_size
from embedding_proxy.providers.charge import NANO
from embedding_proxy.providers.histogram import Histogram
from embedding_proxy.providers.routing.circuit_breaker import State
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .dashboard.failovers import FILE, Event, FailoverLog
from .metric_families import CACHE_DURATION, PREFIX, families_of
from .request_metrics import RequestMetrics, do_nothing
from .shared_counters import FOLDER, PUBLISH_S, Series, SharedCounters, Totals

if TYPE_CHECKING:
    from embedding_proxy.cache.shared.tier import SharedTier

_LEDGER = (By.MODEL, By.PROVIDER, By.CLIENT, By.NAMESPACE)
_OUTCOMES = ("hits", "joins", "misses", "duplicates")
_STATES = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}

_EVENTS = {
    "provider_failures_total": ("failures", "provider"),
    "circuit_breaker_openings_total": ("openings", "provider"),
    "failovers_total": ("failovers", "model"),
}
"""Counters that the timeline of failovers follows: what it calls them, and whose they are."""

Labels: TypeAlias = tuple[tuple[str, str], ...]
Value: TypeAlias = tuple[str, Labels, float]
"""Name, labels, and the number."""


class _Page(Collector):
    """Families that are rendered once."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class Metrics:
    """Tells the metrics of a service."""

    def __init__(self, service: EmbeddingService, requests: RequestMetrics) -> None:
        self._service = service
        self._requests = requests
        self._shared_folder = service.settings.cache.directory / FOLDER
        self._shared = SharedCounters(self._shared_folder)
        self.failovers = FailoverLog(self._shared_folder / FILE)
        self._series_known = 0
        self._followed: list[tuple[Series, Event]] = []
        """The series that the timeline of failovers follows, of so many that are known."""
        self._timer: asyncio.TimerHandle | None = None
        self._tiers_before: Counter[Series] = Counter()
        self._tiers_at_end: Counter[Series] = Counter()
        """What the tiers had counted before they were this one's to publish, and since then, when
        they went to another one."""
        self._owns_tiers = False

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Publish what this process counts for as long as the application runs."""
        await asyncio.to_thread(self._shared.open)
        self._requests.on_change = self._publish_soon
        storage = self._service.storage
        if storage is not None and storage.counts_owner is None:
            self.take_over()
        self._publish()
        try:
            yield
        finally:
            self._requests.on_change = do_nothing
            if self._timer is not None:
                self._timer.cancel()
            self._publish(is_over=True)
            self.failovers.flush()
            self._shared.close()

    def take_over(self) -> None:
        """Publish from now on what the tiers count; another one that did stops."""
        storage = self._service.storage
        if storage is None or storage.counts_owner is self:
            return
        former, storage.counts_owner = storage.counts_owner, self
        now = self._tier_counts()
        if isinstance(former, Metrics):
            former.give_up(now)
            self._tiers_before = now
        self._owns_tiers = True

    def give_up(self, now: Counter[Series]) -> None:
        """Publish no more of what the tiers count than they had counted now."""
        self._tiers_at_end = Counter({name: now[name] - self._tiers_before[name] for name in now})
        self._owns_tiers = False

    def _tier_counts(self) -> Counter[Series]:
        """Return what the tiers have counted since they were opened."""
        counters, shared = self._service.counters, _shared_tier(self._service)
        counts = Counter(
            {
                Series("cache_lookups_total", (("result", "memory"),)): counters.memory_hits,
                Series("cache_lookups_total", (("result", "disk"),)): counters.disk_hits,
                Series("cache_lookups_total", (("result", "miss"),)): counters.misses,
                Series("cache_corrupt_records_total"): counters.mismatches,
                Series("cache_evictions_total"): self._service.evicted,
            }
        )
        if shared is not None:
            counts[Series("cache_lookups_total", (("result", "shared"),))] = counters.shared_hits
            counts.update(_shared_counts(shared))
        return counts

    def _publish_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PUBLISH_S, self._publish)

    def _publish(self, *, is_over: bool = False) -> None:
        self._timer = None
        self._requests.is_change_known = False
        counters = {Series(name, labels): value for name, labels, value in self._counters()}
        self._shared.publish(
            counters, {Series(*one[:2]): one[2] for one in self._gauges()} if not is_over else {}
        )
        self._note_failovers(counters)

    def _note_failovers(self, counters: Mapping[Series, float]) -> None:
        if len(counters) != self._series_known:
            self._series_known = len(counters)
            self._followed = [
                (series, (_EVENTS[series.name][0], dict(series.labels)[_EVENTS[series.name][1]]))
                for series in counters
                if series.name in _EVENTS
            ]
        events: dict[Event, float] = {}
        for series, event in self._followed:
            events[event] = events.get(event, 0) + counters.get(series, 0)
        self.failovers.note(events)

    async def totals(self) -> Totals:
        """Return what all processes have counted; of the others what they have published."""
        self._publish()
        return await asyncio.to_thread(self._shared.read)

    async def get(self, request: web.Request) -> web.Response:
        """Answer with everything."""
        indexing = self._service.indexing
        index = await indexing.indexer.snapshot() if indexing else None
        self._publish()
        if await asyncio.to_thread(self._shared.has_live_others):
            # They have published by then what they have counted until now.
            await asyncio.sleep(2 * PUBLISH_S)
        totals = await asyncio.to_thread(self._shared.read)
        families = [
            *await self._bill(),
            *families_of(totals),
            *await self._store(),
            *_backlog(index or {}),
            self._drift(),
            *self._node(),
            _build_info(),
        ]
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        page = await asyncio.to_thread(encode, _Page(families))
        return web.Response(body=page, headers={"Content-Type": content_type})

    def _counters(self) -> Iterator[Value]:
        """Yield what this process has counted."""
        yield from self._requests_counted()
        service = self._service
        before = self._tiers_before
        for series, count in self._tier_counts().items():
            own = count - before[series] if self._owns_tiers else self._tiers_at_end[series]
            yield series.name, series.labels, own
        yield from self._providers_counted()
        for name, model in service.models.items():
            counts = model.router.counts
            for metric, count in (
                ("retries_total", counts.retries),
                ("failovers_total", counts.failovers),
                ("hedged_requests_total", counts.hedges),
            ):
                # Clients may ask for names without end.
                if count or name in service.settings.models:
                    yield metric, (("model", name),), count
        points = dict(service.indexing.indexer.since_start()) if service.indexing else {}
        if points:
            yield "index_failures_total", (), points.pop("failures")
            yield "index_outbox_corruptions_total", (), points.pop("damaged")
        for result, count in points.items():
            yield "index_points_total", (("result", result),), count

    def _requests_counted(self) -> Iterator[Value]:
        requests = self._requests
        for (route, status), count in requests.by_status.items():
            yield "requests_total", (("route", route), ("status", str(status))), count
        for route, histogram in requests.by_route.items():
            yield from _of_histogram("request_duration_seconds", ("route", route), histogram)
        for result, histogram in (("hit", requests.hits), ("miss", requests.misses)):
            if histogram.count:
                yield from _of_histogram(CACHE_DURATION, ("result", result), histogram)

    def _providers_counted(self) -> Iterator[Value]:
        service = self._service
        for provider, histogram in service.call_durations.items():
            yield from _of_histogram("upstream_duration_seconds", ("provider", provider), histogram)
        for provider, state in service.upstreams.snapshot().items():
            labels = (("provider", provider),)
            yield "provider_attempts_total", labels, state["attempts"]
            yield "circuit_breaker_openings_total", labels, state["opened"]
            for reason, count in state["failures"].items():
                yield "provider_failures_total", (*labels, ("reason", reason)), count
        for provider, models in service.other_models.items():
            for model, count in models.items():
                yield (
                    "provider_model_mismatch_total",
                    (("provider", provider), ("model", model)),
                    count,
                )

    def _gauges(self) -> Iterator[Value]:
        """Yield name, labels and value of how this process is now."""
        yield "requests_in_flight", (), self._requests.in_flight
        yield "cache_unwritten_records", (), self._service.unwritten
        shared = _shared_tier(self._service)
        if shared is not None:
            yield "shared_queued_records", (), shared.queued
            is_closed = shared.is_available
            yield "shared_breaker_state", (), _STATES[State.CLOSED if is_closed else State.OPEN]
        for provider, state in self._service.upstreams.snapshot().items():
            labels = (("provider", provider),)
            yield "provider_ready", labels, state["state"] == State.CLOSED
            yield "circuit_breaker_state", labels, _STATES[state["state"]]
            yield "provider_cooldown_seconds", labels, max(state["rests"].values(), default=0.0)

    async def _bill(self) -> list[Metric]:
        """Return the ledger; nothing while it cannot be read."""
        labels = [by.value for by in _LEDGER]
        inputs = CounterMetricFamily(
            PREFIX + "inputs_total",
            "Inputs answered, by how they were.",
            labels=[*labels, "outcome"],
        )
        tokens = CounterMetricFamily(
            PREFIX + "tokens_total", "Tokens billed and saved.", labels=[*labels, "kind"]
        )
        dollars = CounterMetricFamily(
            PREFIX + "cost_usd_total", "US dollars billed and saved.", labels=[*labels, "kind"]
        )
        for names, usage in await self._service.ledger(_LEDGER) or ():
            values = [name or "" for name in names]
            for outcome in _OUTCOMES:
                inputs.add_metric([*values, outcome], getattr(usage, outcome))
            for kind, count, nano in (
                ("billed", usage.tokens_billed, usage.nanodollars_billed),
                ("saved", usage.tokens_saved, usage.nanodollars_saved),
            ):
                tokens.add_metric([*values, kind], count)
                dollars.add_metric([*values, kind], nano / NANO)
        return [inputs, tokens, dollars]

    async def _store(self) -> list[Metric]:
        """Return the size of the store; nothing while it cannot be read."""
        size = await asyncio.to_thread(read_size, self._service.settings.cache.directory)
        if size is None:
            return []
        return [
            GaugeMetricFamily(PREFIX + "cache_entries", "Entries on disk.", value=size.entries),
            GaugeMetricFamily(
                PREFIX + "cache_bytes",
                "Bytes on disk, with the write-ahead log.",
                value=size.file_bytes,
            ),
        ]

    def _node(self) -> Iterator[Metric]:
        """Yield what this node is, and what it knows of others."""
        storage = self._service.storage
        if storage is None:
            return
        info = GaugeMetricFamily(
            PREFIX + "node_info", "1; the name of this node is a label.", labels=["node"]
        )
        info.add_metric([storage.node], 1)
        yield info
        membership = storage.membership
        if membership is None:
            return
        for name, text, value in (
            ("nodes_alive", "Nodes that share the Redis and are alive.", membership.alive),
            (
                "node_conflict",
                "Whether another node has the same name or id.",
                bool(membership.conflict),
            ),
            (
                "node_clock_ahead_seconds",
                "By how much this machine's clock is ahead of the Redis's.",
                membership.ahead_s,
            ),
            (
                "node_pending_purges",
                "Purges whose entries are still to be deleted here.",
                membership.pending_purges,
            ),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)

    def _drift(self) -> Metric:
        """Return what was found last of each route; the file is everybody's."""
        family = GaugeMetricFamily(
            PREFIX + "model_drift_cosine_similarity",
            "Known texts now against those bought first; below 0.999 the model has changed.",
            labels=["space", "provider", "upstream_model"],
        )
        drift_check = self._service.drift_check
        for route in drift_check.results if drift_check else ():
            family.add_metric(
                [route["space"], route["provider"], route["upstream_model"]], route["cosine"]
            )
        return family


def _shared_tier(service: EmbeddingService) -> "SharedTier | None":
    return None if service.storage is None else service.storage.shared


def _shared_counts(shared: "SharedTier") -> Counter[Series]:
    """Return what the shared tier has counted since it was opened."""
    tier, client = shared.counters, shared.client_counters
    counts: Counter[Series] = Counter(
        {
            Series("shared_corrupt_records_total"): tier.mismatches,
            Series("shared_exchange_seconds_total"): client.seconds,
            Series("shared_breaker_openings_total"): client.times_opened,
        }
    )
    for name, results in (
        ("lookups", {"hit": tier.hits, "miss": tier.misses, "error": tier.errors}),
        ("writes", {"written": tier.writes, "failed": tier.write_errors}),
        (
            "exchanges",
            {"ok": client.exchanges, "failed": client.failures, "refused": client.refused},
        ),
    ):
        for result, count in results.items():
            counts[Series(f"shared_{name}_total", (("result", result),))] = count
    return counts


def _build_info() -> Metric:
    family = GaugeMetricFamily(
        PREFIX + "build_info", "1; the version is a label.", labels=["version"]
    )
    family.add_metric([version("embedding-proxy")], 1)
    return family


def _of_histogram(name: str, label: tuple[str, str], histogram: Histogram) -> Iterator[Value]:
    """Yield the series of a histogram: the counts of its buckets, each of its own, and the sum."""
    for bound, count in histogram.buckets():
        yield f"{name}_bucket", (label, ("le", bound)), count
    yield f"{name}_sum", (label,), histogram.sum_s


def _backlog(index: Mapping[str, float]) -> Iterator[Metric]:
    """Yield what waits for Qdrant: all processes share one outbox."""
    for name, key, text in (
        ("index_backlog_points", "backlog_points", "Points that wait for Qdrant."),
        ("index_backlog_bytes", "backlog_bytes", "Bytes of the points that wait for Qdrant."),
        ("index_backlog_age_seconds", "backlog_age_s", "How long the first of them has waited."),
        ("index_dead_letter_points", "refused_points", "Points that Qdrant refuses, put aside."),
    ):
        if key in index:
            yield GaugeMetricFamily(PREFIX + name, text, value=index[key])

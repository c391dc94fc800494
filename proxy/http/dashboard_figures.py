"""The figures of the dashboard: of all processes that share the cache folder, as plain values.

Sums come from the ledger, counters and gauges from SharedCounters. What takes long to read, the
ledger of past days, is read in the background of the rest, in short parts, and seldom enough that
reading takes at most a fiftieth of the time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import Any, NamedTuple, TypeVar, cast

from embedding_proxy.cache.key import OTHER
from embedding_proxy.cache.ledger import NOTHING, LedgerFilter, LedgerSums, Usage
from embedding_proxy.cache.maintenance.stats import read_age, read_size
from embedding_proxy.providers.charge import NANO, SpendingLimit
from embedding_proxy.providers.histogram import BOUND_NAMES
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.request import Client
from embedding_proxy.proxy.service.storage import GIB

from .auth import Authenticator
from .dashboard.samples import Reading
from .metric_families import CACHE_DURATION
from .metrics import Metrics
from .request_metrics import EMBEDDINGS
from .shared_counters import Series, Totals
from .status import usage_fields

DAY_S = 86_400
SHARE = 50
"""What takes a second to read is read again after so many seconds."""
MIN_REST_S = {
    "past": 5.0,
    "store": 3.0,
    "age": 5.0,
    "failovers": 1.0,
    "history": 3.0,
    "budget": 10.0,
}
"""Seconds for which what was read is told again, by what it is."""
MAX_LINES = 25
"""Models and clients with a line of their own."""
MAX_BUDGETS = 100
MAX_HISTORIES = 64
DRIFT = 0.999
"""Below that cosine a model has changed."""
SPANS: Mapping[str, tuple[str, int]] = {
    "day": ("hour", 1),
    "week": ("hour", 7),
    "month": ("day", 31),
    "year": ("day", 397),
}
"""What can be asked of the history: its unit, and its days; the longest is thirteen months."""
_STATES = ("closed", "half_open", "open")
_T = TypeVar("_T")


class _Cached(NamedTuple):
    value: Any
    again: float
    """When it is to be read again, on the clock of the event loop."""


class Figures:
    """Gathers the figures of one application. For one event loop."""

    def __init__(
        self,
        service: EmbeddingService,
        metrics: Metrics,
        access: Authenticator,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives seconds since 1970."""
        self._service = service
        self._metrics = metrics
        self._access = access
        self._clock = clock
        self._cache: dict[object, _Cached] = {}
        self._reading = asyncio.Lock()
        self._totals = Totals({}, {})
        self._flushed: object = None
        self._day = 0
        """The day (since 1970, UTC) on which all in the cache was read."""

    async def read(self) -> Reading:
        """Return the counters of this moment."""
        self._totals = totals = await self._metrics.totals()
        failures = sum(
            value
            for series, value in totals.counters.items()
            if series.name == "requests_total"
            and dict(series.labels).get("route") == EMBEDDINGS
            and dict(series.labels).get("status", "")[:1] in {"4", "5"}
        )
        hits, misses = (
            tuple(
                totals.counters.get(
                    Series(f"{CACHE_DURATION}_bucket", (("result", result), ("le", bound))), 0.0
                )
                for bound in BOUND_NAMES
            )
            for result in ("hit", "miss")
        )
        in_flight = sum(totals.gauges.get(Series("requests_in_flight"), ()))
        evictions = totals.counters.get(Series("cache_evictions_total"), 0.0)
        return Reading(self._clock(), hits, misses, failures, in_flight, evictions)

    async def state(self) -> dict[str, Any]:
        """Return all figures but the live rates and the history."""
        await self.read()
        await self._write_counts()
        directory = self._service.settings.cache.directory
        size = await self._fetch("store", partial(asyncio.to_thread, read_size, directory))
        age = await self._fetch("age", partial(asyncio.to_thread, read_age, directory))
        failovers = self._metrics.failovers
        timeline = await self._fetch("failovers", partial(asyncio.to_thread, failovers.read))
        indexing = self._service.indexing
        index = await indexing.indexer.snapshot() if indexing else None
        sums = await self._sums()
        store = None if size is None else size._asdict()
        return {
            "version": version("embedding-proxy"),
            "is_open": self._access.is_open,
            "mode": self._service.settings.cache.mode,
            "saved": sums and self._saved(*sums),
            "models": sums and _lines([one.models for one in sums]),
            "clients": sums and _lines([one.clients for one in sums]),
            "budgets": sums and await self._budgets(*sums),
            "providers": self._providers(),
            "failovers": timeline.as_json(),
            "store": store
            and {
                **store,
                "limit_bytes": int(self._service.settings.cache.size_limit_gib * GIB),
                "oldest": age and int(age[0]),
                "least_used": age and int(age[1]),
                "evictions": int(self._totals.counters.get(Series("cache_evictions_total"), 0)),
                "unwritten": int(sum(self._gauges("cache_unwritten_records"))),
            },
            "index": index
            and {
                name: index[name]
                for name in ("backlog_points", "backlog_bytes", "backlog_age_s", "refused_points")
            },
            "warnings": self._warnings(index, sums),
        }

    async def history(
        self, span: str, model: str | None, client: str | None
    ) -> tuple[str, int, list[tuple[int, Usage]]] | None:
        """Return the unit of a span, its first hour or day (since 1970, UTC), and the sums of each.

        Hours and days without any sum are left out. None while the ledger cannot be read.
        """
        unit, days = SPANS[span]
        today = self._today
        # The hours of a day and the one that has begun.
        first = today - days + (unit == "day")
        lines = LedgerFilter(client, first, model=model)
        storage = self._service.storage
        if storage is None:
            return None
        await self._write_counts()
        if unit == "hour":
            start = int(self._clock() // 3600) - 24 * days + 1
            read: Callable[[], Awaitable[Any]] = partial(storage.store.ledger_hours, lines)
        else:
            start, read = first, partial(storage.store.ledger_sums, lines)
        found = await self._fetch(("history", span, model, client), read)
        if found is None:
            return None
        sums = found.days if isinstance(found, LedgerSums) else found
        return unit, start, sorted(one for one in sums.items() if one[0] >= start)

    def end_of(self, unit: str) -> int:
        """Return the hour or day (since 1970, UTC) that is not over yet."""
        return int(self._clock() // (3600 if unit == "hour" else DAY_S))

    @property
    def _today(self) -> int:
        return int(self._clock() // DAY_S)

    async def _fetch(self, name: object, read: Callable[[], Awaitable[_T]]) -> _T:
        """Return what was read a moment ago, or read it; one thing at a time is read."""
        loop = asyncio.get_running_loop()
        if self._day != self._today:
            self._day = self._today
            self._cache.clear()
        cached = self._cache.get(name)
        if cached is None or cached.again <= loop.time():
            async with self._reading:
                cached = self._cache.get(name)
                if cached is None or cached.again <= loop.time():
                    began = loop.time()
                    value = await read()
                    rest = MIN_REST_S[name[0] if isinstance(name, tuple) else str(name)]
                    took = loop.time() - began
                    cached = _Cached(value, loop.time() + max(rest, SHARE * took))
                    self._put(name, cached)
        return cast("_T", cached.value)

    def _put(self, name: object, cached: _Cached) -> None:
        self._cache.pop(name, None)
        self._cache[name] = cached
        histories = [one for one in self._cache if isinstance(one, tuple) and one[0] == "history"]
        for one in histories[:-MAX_HISTORIES]:
            del self._cache[one]

    async def _write_counts(self) -> None:
        """Have what this process has counted written, if it has counted anything since."""
        storage = self._service.storage
        counted = dict(self._service.counted)
        if storage is not None and counted != self._flushed:
            self._flushed = counted
            await storage.store.flush_counts()

    async def _sums(self) -> tuple[LedgerSums, LedgerSums, LedgerSums] | None:
        """Return the sums of today, of this month and of all days; None while nobody can read."""
        storage = self._service.storage
        if storage is None:
            return None
        today = self._today
        month = SpendingLimit(0, "month").first_day(self._clock())
        ledger_sums = storage.store.ledger_sums
        parts: list[LedgerSums] = []
        for name, lines in (
            ("month", LedgerFilter(first_day=month, end_day=today)),
            ("before", LedgerFilter(end_day=month)),
        ):
            past = await self._fetch(("past", name), partial(ledger_sums, lines))
            if past is None:
                return None
            parts.append(past)
        of_today = await ledger_sums(LedgerFilter(first_day=today))
        if of_today is None:
            return None
        # The names of the earliest days come first, as in /status.
        before, of_month, ever = parts[1], LedgerSums.empty(), LedgerSums.empty()
        for one in (parts[0], of_today):
            of_month.add(one)
        for one in (before, of_month):
            ever.add(one)
        return of_today, of_month, ever

    def _saved(self, today: LedgerSums, month: LedgerSums, ever: LedgerSums) -> dict[str, Any]:
        since = min(ever.days, default=None)
        return {
            "today": usage_fields(today.total),
            "month": usage_fields(month.total),
            "ever": usage_fields(ever.total),
            "since": None if since is None else DAY_S * since,
        }

    async def _budgets(
        self, today: LedgerSums, month: LedgerSums, ever: LedgerSums
    ) -> list[dict[str, Any]]:
        sums = {"day": today.clients, "month": month.clients, "ever": ever.clients}
        told = []
        for name, limit in [*self._access.budgets.items()][:MAX_BUDGETS]:
            clients = sums[limit.period]
            billed = clients.get(name, NOTHING).nanodollars_billed
            if name not in clients and OTHER in clients:
                # One of so many that the sums above do not name it; its budget does.
                client = Client(client=name, limit=limit)
                billed = await self._fetch(("budget", name), partial(self._service.billed, client))
            told.append(
                {
                    "client": name,
                    "period": limit.period,
                    "usd": limit.nanodollars / NANO,
                    "usd_billed": billed / NANO,
                }
            )
        return sorted(told, key=lambda one: -float(one["usd_billed"]) / (float(one["usd"]) or 1))

    def _gauges(self, name: str, provider: str | None = None) -> Sequence[float]:
        labels = () if provider is None else (("provider", provider),)
        return self._totals.gauges.get(Series(name, labels), ())

    def _providers(self) -> list[dict[str, Any]]:
        """Return the providers that were asked at some time, as the worst process sees them."""
        attempts: dict[str, float] = {}
        failures: dict[str, dict[str, int]] = {}
        for (name, pairs), value in self._totals.counters.items():
            labels = dict(pairs)
            if name == "provider_attempts_total":
                attempts[labels["provider"]] = value
            elif name == "provider_failures_total" and value:
                failures.setdefault(labels["provider"], {})[labels["reason"]] = int(value)
        names = [name for name in self._service.settings.providers if name in attempts]
        return [
            {
                "name": name,
                "state": _STATES[int(max(self._gauges("circuit_breaker_state", name), default=0))],
                "cooldown_s": max(self._gauges("provider_cooldown_seconds", name), default=0),
                "attempts": int(attempts[name]),
                "failures": failures.get(name, {}),
            }
            for name in names
        ]

    def _warnings(
        self, index: Mapping[str, Any] | None, sums: tuple[LedgerSums, ...] | None
    ) -> list[str]:
        """Return a sentence for each thing that somebody should look at."""
        service = self._service
        models = service.models
        # Models without a provider are no matter for as long as nobody wants them.
        used = sums[-1].models if sums else {}
        told = [
            str(model.router.unavailable)
            for name, model in models.items()
            if name in used and not model.usable
        ]
        if models and service.settings.cache.mode != "frozen":
            first = next(iter(models.values()))
            if not any(model.usable for model in models.values()):
                told = [str(first.router.unavailable)]
        for route in service.drift_check.results if service.drift_check else ():
            if (route["cosine"] or 1.0) < DRIFT:
                told.append(
                    f"{route['upstream_model']} at {route['provider']} has changed: known texts now"
                    f" have a cosine of {route['cosine']:.4f} with those bought first"
                )
        told += [
            f"{labels['provider']} has answered {int(value):,} times as {labels['model'][:100]},"
            " which is not the model that was asked for"
            for name, labels, value in (
                (series.name, dict(series.labels), value)
                for series, value in self._totals.counters.items()
            )
            if name == "provider_model_mismatch_total" and value
        ]
        if index and index["refused_points"]:
            told.append(f"Qdrant has refused {index['refused_points']:,} points")
        return told[:MAX_LINES]


def _lines(sums: Sequence[Mapping[str, Usage]]) -> list[dict[str, Any]]:
    """Return the names that have saved most in all, with their sums, and one line of the others."""
    today, month, ever = sums

    def rank(name: str) -> tuple[int, int, str]:
        return -ever[name].nanodollars_saved, -ever[name].tokens_saved, name

    names = sorted(ever, key=rank)
    shown, others = names[:MAX_LINES], names[MAX_LINES:]
    return [
        {
            "name": name,
            "names": count,
            **{
                period: usage_fields(_total(one.get(part, NOTHING) for part in parts))
                for period, one in (("today", today), ("month", month), ("ever", ever))
            },
        }
        for name, count, parts in chain(
            ((name, 1, [name]) for name in shown),
            ([(None, len(others), others)] if others else []),
        )
    ]


def _total(usages: Any) -> Usage:  # noqa: ANN401
    total = NOTHING
    for usage in usages:
        total = total.plus(usage)
    return total


def csv(unit: str, points: Sequence[tuple[int, Usage]]) -> str:
    """Return a history as a table, its times in ISO 8601 (UTC)."""
    seconds = 3600 if unit == "hour" else DAY_S
    names = [*usage_fields(NOTHING)]
    rows = [",".join((unit, *names))]
    for place, usage in points:
        at = datetime.fromtimestamp(seconds * place, UTC)
        shown = at.strftime("%Y-%m-%dT%H:00Z") if unit == "hour" else at.date().isoformat()
        rows.append(",".join((shown, *(f"{value:.12g}" for value in usage_fields(usage).values()))))
    return "\r\n".join(rows) + "\r\n"

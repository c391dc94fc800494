"""DriftCheck: known texts that are embedded again now and then, to notice a model that has changed.

A provider may replace a model without a word. Vectors bought before and after would not compare,
and nothing would fail. So every route in use is asked the same few texts, past the cache, and its
answers are held against those that were bought first, which the cache keeps like any others.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar

import orjson
from embedding_proxy.cache import atomic_file
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.providers.attempts import Attempt
from embedding_proxy.providers.base import Context
from embedding_proxy.providers.charge import Account
from embedding_proxy.providers.errors import EmbeddingError
from embedding_proxy.providers.route_check import SAME, TEXTS, Probe, agreement, probe
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.routing.route import Route

from .model_registry import Model

NAMESPACE = "embedding-proxy/canary"
"""Where the first answers are kept; never evicted."""
CHECK_INTERVAL_S = 600.0
"""How often it is seen whether any is due; so long after a start there is none."""
TIMEOUT_S = 60.0
"""How long one route may take."""
HOUR = 3600.0
MAX_ROUTES = 1000
"""Routes of which something is kept in the file; of more, those asked longest ago are forgotten."""

log = logging.getLogger("embedding_proxy.drift_check")

T = TypeVar("T")


class DriftResult(TypedDict):
    """What came of asking one route."""

    space: str
    provider: str
    upstream_model: str
    cosine: float
    """The smallest between the answers now and those bought first."""
    at: float
    """Seconds since 1970."""


_RouteKey = tuple[str, str, str]
"""A route: the label of the space, the provider, and the provider's name for the model."""


class DriftCheck:
    """Asks each route of every model that is in use, once in so many hours.

    What was asked and found is kept in a file, which all workers share: one of them at a time asks
    for all, and a restart does not begin anew. Open them with `async with`; `clock` gives seconds
    since 1970.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        upstreams: HealthRegistry,
        file: Path,
        *,
        hours: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._models = models
        self._upstreams = upstreams
        self._file = file
        self._lock_file = file.with_suffix(".lock")
        self._hours = hours
        self._clock = clock
        self._attempts: Counter[str] = Counter()
        self._asked: dict[_RouteKey, float] = {}
        """When a route was asked last by this worker, whether or not it has answered."""
        self._task: asyncio.Task[None] | None = None

    @property
    def results(self) -> list[DriftResult]:
        """What was found last of each route, by any worker; of MAX_ROUTES routes at most."""
        try:
            rows = [
                DriftResult(
                    space=str(row["space"]),
                    provider=str(row["provider"]),
                    upstream_model=str(row["upstream_model"]),
                    cosine=float(row["cosine"]),
                    at=float(row["at"]),
                )
                for row in self._read()["routes"]
            ]
        except (KeyError, ValueError, TypeError):
            return []
        return _newest({_name(row): row for row in rows}, lambda row: row["at"])

    @property
    def _asked_by_any(self) -> dict[_RouteKey, float]:
        """When each route was asked last, by any worker, whether or not it has answered."""
        times = dict(self._asked)
        pairs = [(_name(row), row["at"]) for row in self.results]
        try:
            rows = self._read().get("asked", [])
            pairs += [
                ((str(space), str(provider), str(model)), float(at))
                for space, provider, model, at in rows
            ]
        except (ValueError, TypeError):
            pass
        for key, at in pairs:
            times[key] = max(times.get(key, -math.inf), at)
        return times

    def _read(self) -> dict[str, Any]:
        """Return what the file holds; nothing where it cannot be read."""
        try:
            content = orjson.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    async def __aenter__(self) -> Self:
        """Begin to check, in the background."""
        self._task = asyncio.create_task(self._check_forever())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(min(CHECK_INTERVAL_S, self._hours * HOUR))
            try:
                await self.check()
            except Exception:  # whatever it is, it is nobody else's trouble
                log.exception("the drift check failed")

    async def check(self) -> list[DriftResult]:
        """Ask the routes that are due, one after the other, and return what was found.

        While another worker does so, nothing is asked: what is due then is seen at the next check.
        """
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(closing(WriterLock(self._lock_file, 0)))
                stack.enter_context(lock)
            except TimeoutError:
                return []
            except OSError as error:
                # Where there can be no lock there can be no file: each worker asks for itself.
                log.info("%s: cannot be locked: %s", self._lock_file, error)
            return await self._check()

    async def _check(self) -> list[DriftResult]:
        results: list[DriftResult] = []
        for name, model in list(self._models.items()):
            attempts = model.router.counts.attempts
            if not model.space.dimensions or attempts <= self._attempts[name]:
                continue
            routes = self._due(model)
            if routes:
                some = await self._ask(model, routes)
                results += some
                # After each model, so that what was paid for is known if the next one is cut short.
                await asyncio.to_thread(self._keep, some)
            self._attempts[name] = model.router.counts.attempts
        return results

    def _due(self, model: Model) -> list[Route]:
        """Return the routes that may be asked, and that no worker has asked for long."""
        times = self._asked_by_any
        now = self._clock()
        return [
            route
            for route in model.router.routes
            # Of clients' keys there is none at hand, and none is spent on this.
            if not route.by_client
            and self._upstreams.of(route.name).ready(route.model)
            # A clock that was put back must not silence them for years.
            and not 0 <= now - times.get(_key(model, route), -math.inf) < self._hours * HOUR
        ]

    async def _ask(self, model: Model, routes: Sequence[Route]) -> list[DriftResult]:
        """Hold the answers of routes against those that were bought first."""
        self._asked.update({_key(model, route): self._clock() for route in routes})
        try:
            first = await model.embedder.embed(model.space, TEXTS, self._context(model))
        except EmbeddingError as error:
            log.info("%s: the texts of the drift check could not be bought: %s", model.name, error)
            return []
        results = []
        for route in routes:
            answer = await self._probe(model, route)
            if answer.failure is not None:
                log.info("%s: the drift check got no answer: %s", route.name, answer.failure)
                continue
            cosine = agreement(first.vectors, answer.vectors)
            if cosine < SAME:
                log.error(
                    "%s: THE MODEL %s HAS CHANGED: known texts have other vectors than those that"
                    " were bought first (cosine %.4f, wanted %s). What is bought of it now does not"
                    " compare with what is in the cache; embedding-proxy check tells more",
                    *(route.name, route.model, cosine, SAME),
                )
            space, provider, upstream_model = _key(model, route)
            results.append(
                DriftResult(
                    space=space,
                    provider=provider,
                    upstream_model=upstream_model,
                    cosine=round(cosine, 6),
                    at=self._clock(),
                )
            )
        return results

    async def _probe(self, model: Model, route: Route) -> Probe:
        """Ask a route past the cache. The call is billed, also if the proxy stops meanwhile."""
        context = self._context(model)
        charge = model.embedder.on_charge(model.space, context)
        context = replace(context, on_charge=charge, finishes_calls=True)
        answers: list[Probe] = []

        async def work(attempt: Attempt) -> None:
            own = replace(context, attempt=attempt)
            answers.append(await probe(route, model.space, own, self._upstreams.clock))

        await self._upstreams.attempts.make(work)
        return answers[0]

    def _context(self, model: Model) -> Context:
        account = Account(model.name, price=model.price)
        deadline = self._upstreams.clock() + TIMEOUT_S
        return Context(deadline, namespace=NAMESPACE, account=account)

    def _keep(self, results: Sequence[DriftResult]) -> None:
        """Add to the file what was asked and found. For the worker that holds the lock."""
        by_route = {_name(result): result for result in (*self.results, *results)}
        times = {key: (*key, at) for key, at in self._asked_by_any.items()}
        content = {
            "routes": _newest(by_route, lambda result: result["at"]),
            "asked": _newest(times, lambda row: row[-1]),
        }
        try:
            atomic_file.write(self._file, orjson.dumps(content, option=orjson.OPT_INDENT_2))
        except OSError as error:
            log.warning("%s: the results of the drift check cannot be kept: %s", self._file, error)


def _newest(rows: Mapping[_RouteKey, T], at: Callable[[T], float]) -> list[T]:
    """Return the rows of the MAX_ROUTES routes asked last, in their order."""
    if len(rows) <= MAX_ROUTES:
        return list(rows.values())
    newest = set(sorted(rows, key=lambda key: at(rows[key]))[-MAX_ROUTES:])
    return [row for key, row in rows.items() if key in newest]


def _name(result: DriftResult) -> _RouteKey:
    return result["space"], result["provider"], result["upstream_model"]


def _key(model: Model, route: Route) -> _RouteKey:
    return model.space.label, route.name, route.model

"""Canaries: known texts that are embedded again now and then, to notice a model that has changed.

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
from dataclasses import replace
from pathlib import Path
from typing import Self, TypedDict

import orjson

from providers.base import Account, Context, EmbeddingError
from providers.probe import SAME, TEXTS, agreement, probe
from providers.routing.health import Upstreams
from providers.routing.route import Route

from .registry import Model

NAMESPACE = "embedding-proxy/canary"
"""Where the first answers are kept; never evicted."""
LOOK_S = 600.0
"""How often it is seen whether any is due; so long after a start there is none."""
PATIENCE_S = 60.0
"""How long one route may take."""
HOUR = 3600.0

log = logging.getLogger("embedding_proxy.canary")


class Finding(TypedDict):
    """What came of asking one route."""

    space: str
    provider: str
    upstream_model: str
    cosine: float
    """The smallest between the answers now and those bought first."""
    at: float
    """Seconds since 1970."""


class Canaries:
    """Asks each route of every model that is in use, once in so many hours.

    The findings are kept in a file, which all workers share: one of them asks for all, and a
    restart does not begin anew. Open them with `async with`; `clock` gives seconds since 1970.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        upstreams: Upstreams,
        file: Path,
        *,
        hours: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._models = models
        self._upstreams = upstreams
        self._file = file
        self._hours = hours
        self._clock = clock
        self._attempts: Counter[str] = Counter()
        self._asked: dict[tuple[str, str, str], float] = {}
        self._looking: asyncio.Task[None] | None = None

    @property
    def findings(self) -> list[Finding]:
        """What was found last of each route, by any worker."""
        try:
            return [
                Finding(
                    space=str(one["space"]),
                    provider=str(one["provider"]),
                    upstream_model=str(one["upstream_model"]),
                    cosine=float(one["cosine"]),
                    at=float(one["at"]),
                )
                for one in orjson.loads(self._file.read_bytes())["routes"]
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    async def __aenter__(self) -> Self:
        """Begin to look, in the background."""
        self._looking = asyncio.create_task(self._look_for_ever())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(min(LOOK_S, self._hours * HOUR))
            try:
                await self.look()
            except Exception:  # whatever it is, it is nobody else's trouble
                log.exception("the canaries could not be asked")

    async def look(self) -> list[Finding]:
        """Ask the routes that are due, one after the other, and return what was found."""
        found: list[Finding] = []
        for name, model in list(self._models.items()):
            if model.space.dimensions and model.router.counts.attempts > self._attempts[name]:
                found += await self._ask(model, self._due(model))
                self._attempts[name] = model.router.counts.attempts
        if found:
            newest = {_name(one): one for one in (*self.findings, *found)}
            self._keep(list(newest.values()))
        return found

    def _due(self, model: Model) -> list[Route]:
        """Return the routes that may be asked, and that no worker has asked for long."""
        asked = dict(self._asked)
        for one in self.findings:
            asked[_name(one)] = max(asked.get(_name(one), -math.inf), one["at"])
        now = self._clock()
        return [
            route
            for route in model.router.routes
            # Of clients' keys there is none at hand, and none is spent on this.
            if not route.by_client
            and self._upstreams.of(route.name).ready(route.model)
            # A clock that was put back must not silence them for years.
            and not 0 <= now - asked.get(_key(model, route), -math.inf) < self._hours * HOUR
        ]

    async def _ask(self, model: Model, routes: Sequence[Route]) -> list[Finding]:
        """Hold the answers of routes against those that were bought first."""
        if not routes:
            return []
        self._asked.update({_key(model, route): self._clock() for route in routes})
        try:
            first = await model.embedder.embed(model.space, TEXTS, self._context(model))
        except EmbeddingError as error:
            log.info("%s: its canaries could not be bought: %s", model.name, error)
            return []
        found = []
        for route in routes:
            context = self._context(model)
            charge = model.embedder.on_charge(model.space, context)
            context = replace(context, on_charge=charge, finishes_calls=True)
            answer = await probe(route, model.space, context, self._upstreams.clock)
            if answer.failure is not None:
                log.info("%s: the canaries were not answered: %s", route.name, answer.failure)
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
            found.append(
                Finding(
                    space=space,
                    provider=provider,
                    upstream_model=upstream_model,
                    cosine=round(cosine, 6),
                    at=self._clock(),
                )
            )
        return found

    def _context(self, model: Model) -> Context:
        account = Account(model.name, price=model.price)
        deadline = self._upstreams.clock() + PATIENCE_S
        return Context(deadline, namespace=NAMESPACE, account=account)

    def _keep(self, findings: list[Finding]) -> None:
        part = self._file.with_suffix(".part")
        try:
            part.write_bytes(orjson.dumps({"routes": findings}, option=orjson.OPT_INDENT_2))
            part.replace(self._file)
        except OSError as error:
            log.warning("%s: the canaries' findings cannot be kept: %s", self._file, error)


def _name(finding: Finding) -> tuple[str, str, str]:
    return finding["space"], finding["provider"], finding["upstream_model"]


def _key(model: Model, route: Route) -> tuple[str, str, str]:
    return model.space.label, route.name, route.model

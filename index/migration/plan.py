"""The plan of a migration: what it would do and cost, from a read-only pass over the old points."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from embedding_proxy.index.collection_reader import Point, PointId
from embedding_proxy.providers.profile import Limits

from .embedding import Model
from .points import Points
from .qdrant import SourceCollection
from .runner import (
    Decision,
    MigrationRequest,
    Pace,
    Progress,
    decide,
    resolve_rule,
    target_of,
    vector_error,
)

CALL_S = 1.0
"""Seconds that a provider is taken to need for one call: nothing is bought to find out."""
PASSES = 6
"""What the copy and a comparison ask of Qdrant, in readings of the old collection as this one."""
_SHOWN = 10
USUAL = Limits()


@dataclass(slots=True)
class Plan:
    """What is known of one collection before it is migrated."""

    collection: str
    source: str
    target: str
    width: int
    dimensions: int
    decision: Decision
    rule: str
    """Where the texts are."""
    points: int = 0
    without_text: int = 0
    odd_vectors: dict[str, int] = field(default_factory=dict)
    """Points whose old vector is no good, by what is wrong with it."""
    without_vector: int = 0
    """Points that have no old vector; one with a text gets a new one all the same."""
    others_only: int = 0
    """Points without text and old vector: carried without a new vector."""
    fields: set[str] = field(default_factory=set)
    """The fields of the payloads."""
    numeric_ids: int = 0
    uuid_ids: int = 0
    dead: int = 0
    """Points that cannot be carried."""
    first_dead: list[PointId] = field(default_factory=list)
    to_embed: int = 0
    """Points that need a vector of the new model."""
    distinct: int = 0
    """Texts among them, each counted once, over all collections of one command."""
    cached: int = 0
    """Texts that need not be bought."""
    to_buy: int = 0
    """Texts to buy, or the sample where vectors are copied."""
    tokens: int = 0
    """Of the distinct texts."""
    tokens_to_buy: int = 0
    dollars: float = 0.0
    """Of the tokens to buy: what is in the cache costs nothing."""
    calls: int = 0
    """In which the texts to buy are asked for."""
    seconds_buying: float = 0.0
    """An estimate: so many calls of CALL_S, and no more a minute than the provider takes."""
    seconds_moving: float = 0.0
    """An estimate: the time that reading took just now, PASSES times."""
    seconds: float = 0.0
    """Both together, or more where `--points-per-second` says so."""


class Survey:
    """Plans collections one after another; a text that several have is bought once."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it is made of
        self,
        points: Points,
        model: Model,
        price: float,
        pace: Pace,
        limits: Limits = USUAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`price` is in USD per million tokens; `limits` are those of who will be asked first."""
        self._limits = limits
        self._clock = clock
        self._points = points
        self._model = model
        self._price = price
        self._pace = pace
        self._seen: set[bytes] = set()

    async def plan(
        self, wanted: MigrationRequest, old: SourceCollection, progress: Progress
    ) -> Plan:
        """Return what migrating a collection means. Raises MigrationRefused, QdrantFailure."""
        model, pace = self._model, self._pace
        decision = decide(old, wanted, model)
        rule = await resolve_rule(self._points, old, wanted)
        found = Plan(
            collection=wanted.collection,
            source=old.name,
            target=target_of(old, wanted, model),
            width=old.width,
            dimensions=model.dimensions,
            decision=decision,
            rule=rule.source,
        )
        pages = self._points.pages(old.name, pace.page, vectors=True)
        sampled = 0
        reading = 0.0
        with progress(f"planning {wanted.collection}", old.points) as tell:
            while True:
                begun = self._clock()
                page = await anext(pages, None)
                if page is None:
                    break
                reading += self._clock() - begun
                texts = []
                for point in page.points:
                    text = rule.text(point.payload)
                    wrong = vector_error(point, old.width, model.dimensions)
                    _count(found, point, text, wrong)
                    if text is not None and (wrong or not decision.regime.copies):
                        texts.append(text)
                    elif text is not None and sampled < pace.sample:
                        # These stand for the sample: which it is will be drawn when it runs.
                        sampled += 1
                        await self._sampled(found, text)
                await self._price_of(found, texts)
                tell(found.points)
        found.dollars = found.tokens_to_buy * self._price / 1e6
        self._take_time(found)
        found.seconds_moving = PASSES * reading
        found.seconds = found.seconds_buying + found.seconds_moving
        if pace.points_per_second:
            found.seconds = max(found.seconds, found.points / pace.points_per_second)
        return found

    def _take_time(self, found: Plan) -> None:
        """Estimate what buying takes, within what the provider takes in a call and in a minute."""
        limits, pace = self._limits, self._pace
        in_one = min(pace.page, limits.inputs)
        found.calls = -(-found.to_buy // in_one)
        if limits.tokens:
            found.calls = max(found.calls, -(-found.tokens_to_buy // limits.tokens))
        beside = min(pace.ahead * -(-pace.page // in_one), limits.concurrency)
        minutes = max(
            found.calls / (limits.requests_per_minute or math.inf),
            found.tokens_to_buy / (limits.tokens_per_minute or math.inf),
        )
        found.seconds_buying = max(-(-found.calls // beside) * CALL_S, 60 * minutes)

    async def _sampled(self, found: Plan, text: str) -> None:
        (look,) = await self._model.look([text])
        found.to_buy += 1
        found.tokens_to_buy += look.tokens

    async def _price_of(self, found: Plan, texts: list[str]) -> None:
        found.to_embed += len(texts)
        for look in await self._model.look(texts) if texts else ():
            if look.key in self._seen:
                continue
            self._seen.add(look.key)
            found.distinct += 1
            found.tokens += look.tokens
            if look.cached:
                found.cached += 1
            else:
                found.to_buy += 1
                found.tokens_to_buy += look.tokens


def _count(found: Plan, point: Point, text: str | None, wrong: str | None) -> None:
    found.points += 1
    found.fields.update(point.payload)
    found.without_text += text is None
    found.without_vector += point.vector is None
    if isinstance(point.id, int):
        found.numeric_ids += 1
    else:
        found.uuid_ids += 1
    if point.vector is None:
        found.others_only += text is None
        return
    if wrong is not None:
        found.odd_vectors[wrong] = found.odd_vectors.get(wrong, 0) + 1
    if text is None and (wrong is not None or not found.decision.regime.copies):
        found.dead += 1
        if len(found.first_dead) < _SHOWN:
            found.first_dead.append(point.id)

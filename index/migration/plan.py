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
"""The assumed seconds of one call of a provider. Nothing is bought to measure it."""
PASSES = 6
"""The load of a copy and a comparison on Qdrant, in passes over the old collection."""
_SHOWN = 10
USUAL = Limits()


@dataclass(slots=True)
class Plan:
    """The facts about one collection before its migration."""

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
    """The numbers of points with an unusable old vector, by the reason."""
    without_vector: int = 0
    """Points without an old vector. Those with a text get a new one."""
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
    """Distinct texts of these points, over all collections of one command."""
    cached: int = 0
    """Texts that need not be bought."""
    to_buy: int = 0
    """Texts to buy; if vectors are copied, the sample."""
    tokens: int = 0
    """Tokens of the distinct texts."""
    tokens_to_buy: int = 0
    dollars: float = 0.0
    """The price of the tokens to buy; cached texts cost nothing."""
    calls: int = 0
    """The number of calls that buy the texts."""
    seconds_buying: float = 0.0
    """An estimate: the calls at CALL_S each, within the provider's limits a minute."""
    seconds_moving: float = 0.0
    """An estimate: PASSES times the time of this reading."""
    seconds: float = 0.0
    """The sum of both, or more if `--points-per-second` requires it."""


class Survey:
    """Plans collections one after another. A text in several of them counts once."""

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
        self, request: MigrationRequest, old: SourceCollection, progress: Progress
    ) -> Plan:
        """Return the plan of a collection. Raises MigrationRefused, QdrantFailure."""
        model, pace = self._model, self._pace
        decision = decide(old, request, model)
        rule = await resolve_rule(self._points, old, request)
        plan = Plan(
            collection=request.collection,
            source=old.name,
            target=target_of(old, request, model),
            width=old.width,
            dimensions=model.dimensions,
            decision=decision,
            rule=rule.source,
        )
        pages = self._points.pages(old.name, pace.page, vectors=True)
        sample_size = 0
        reading = 0.0
        with progress(f"planning {request.collection}", old.points) as tell:
            while True:
                start = self._clock()
                page = await anext(pages, None)
                if page is None:
                    break
                reading += self._clock() - start
                texts = []
                for point in page.points:
                    text = rule.text(point.payload)
                    wrong = vector_error(point, old.width, model.dimensions)
                    _count(plan, point, text, wrong)
                    if text is not None and (wrong or not decision.regime.copies):
                        texts.append(text)
                    elif text is not None and sample_size < pace.sample:
                        # These points represent the sample; `run` draws the real one.
                        sample_size += 1
                        await self._add_sample(plan, text)
                await self._add_purchases(plan, texts)
                tell(plan.points)
        plan.dollars = plan.tokens_to_buy * self._price / 1e6
        self._estimate_time(plan)
        plan.seconds_moving = PASSES * reading
        plan.seconds = plan.seconds_buying + plan.seconds_moving
        if pace.points_per_second:
            plan.seconds = max(plan.seconds, plan.points / pace.points_per_second)
        return plan

    def _estimate_time(self, plan: Plan) -> None:
        """Estimate the time of the purchases within the provider's limits a call and a minute."""
        limits, pace = self._limits, self._pace
        in_one = min(pace.page, limits.inputs)
        plan.calls = -(-plan.to_buy // in_one)
        if limits.tokens:
            plan.calls = max(plan.calls, -(-plan.tokens_to_buy // limits.tokens))
        beside = min(pace.ahead * -(-pace.page // in_one), limits.concurrency)
        minutes = max(
            plan.calls / (limits.requests_per_minute or math.inf),
            plan.tokens_to_buy / (limits.tokens_per_minute or math.inf),
        )
        plan.seconds_buying = max(-(-plan.calls // beside) * CALL_S, 60 * minutes)

    async def _add_sample(self, plan: Plan, text: str) -> None:
        (look,) = await self._model.look([text])
        plan.to_buy += 1
        plan.tokens_to_buy += look.tokens

    async def _add_purchases(self, plan: Plan, texts: list[str]) -> None:
        plan.to_embed += len(texts)
        for look in await self._model.look(texts) if texts else ():
            if look.key in self._seen:
                continue
            self._seen.add(look.key)
            plan.distinct += 1
            plan.tokens += look.tokens
            if look.cached:
                plan.cached += 1
            else:
                plan.to_buy += 1
                plan.tokens_to_buy += look.tokens


def _count(plan: Plan, point: Point, text: str | None, wrong: str | None) -> None:
    plan.points += 1
    plan.fields.update(point.payload)
    plan.without_text += text is None
    plan.without_vector += point.vector is None
    if isinstance(point.id, int):
        plan.numeric_ids += 1
    else:
        plan.uuid_ids += 1
    if point.vector is None:
        plan.others_only += text is None
        return
    if wrong is not None:
        plan.odd_vectors[wrong] = plan.odd_vectors.get(wrong, 0) + 1
    if text is None and (wrong is not None or not plan.decision.regime.copies):
        plan.dead += 1
        if len(plan.first_dead) < _SHOWN:
            plan.first_dead.append(point.id)

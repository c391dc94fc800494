"""The models that can be asked for: those configured, and others by their names alone."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from cache.embedder import MAX_ROUNDS_WITH_STRANGERS, CachingEmbedder
from cache.errors import NotCached
from cache.in_flight import InFlight, SharedTask, wait
from cache.key import Namespace, keyring
from cache.ledger import Answered
from cache.tiered import Tiers
from providers import kinds
from providers.base import (
    Bill,
    Context,
    DeadlineExceeded,
    Embedded,
    Embedder,
    EmbeddingError,
    Input,
    InputRefused,
    OnCharge,
    Space,
)
from providers.batching.longest import NoneTooLong
from providers.http import HttpProvider
from providers.router import Provider, Router
from providers.routing.health import Upstreams
from proxy.settings import model_entry
from proxy.settings.model_entry import Fallback
from proxy.settings.schema import Settings

from .by_client import ByClient, by_client
from .learned import LearnedDimensions
from .opening import make_router, scheduled
from .steps import one_before_others
from .widths import WIDEST

MOST_KEPT = 1000
"""Models that are listed at most; and as many that are not, being asked for by name alone."""

# By so many seconds a clock that is read later may be behind.
_CLOCK_S = 1.0


class ModelUnknown(InputRefused):
    """No such model is configured or in the catalogue, and nobody may be asked for it by name."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model `{model[:200]}` does not exist or you do not have access to it.",
            status=404,
            param="model",
            code="model_not_found",
        )


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for."""

    name: str
    space: Space
    """Its `dimensions` are 0 until they are known."""
    price: float
    """USD per million tokens."""
    router: Router
    """The routes that can be used; it knows no cache."""
    source: Embedder
    """What is asked for what no cache has: the batches for the router."""
    embedder: CachingEmbedder
    """What requests are asked of: the cache around the source."""
    dimensions_refused: bool = False
    """Whether `dimensions` is an error even at the native width, as for OpenAI's ada-002."""
    width: str = "strict"
    """What may be done for a width that the model does not have: a policy, or a strategy."""
    context: int | None = None
    """Tokens an input may have; None = nothing is known of it."""
    truncate_to: int | None = None
    """Tokens to which an input is cut before the cache is asked; None = it is not cut."""
    fallbacks: tuple[Fallback, ...] = ()
    """Models of other spaces that may stand in when no route answers, in this order."""
    by_client: ByClient | None = None
    """How it is asked for with the client's own key; None = it is not."""
    neutral_fields: frozenset[str] = frozenset()
    """Request fields that one of its providers declares to change no number."""
    by_name: bool = False
    """Whether nothing is known of it but its name."""

    @property
    def usable(self) -> bool:
        """Whether a provider is configured; without one, what is cached is still served."""
        return bool(self.router.routes)

    def at(self, dimensions: int) -> "Model":
        """Return the model at a width that is asked of the upstream: a space of its own.

        Nothing says that a model known by name alone may be cut, so it is not. Raises InputRefused.
        """
        if not 1 <= dimensions <= WIDEST:
            raise InputRefused(
                f"Invalid value for 'dimensions' = {dimensions}: must be at least 1 and at most"
                f" {WIDEST}.",
                param="dimensions",
            )
        name = f"{self.space.name}@{dimensions}"
        space = replace(self.space, name=name, dimensions=dimensions, dimensions_sent=True)
        return replace(self, space=space)


_Learning: TypeAlias = SharedTask[Input, tuple[int, Answered]]
"""Buys one input of a space; gives the width, and the answer to that input and its equals."""


class Registry:
    """Models by the names that clients use.

    Tiers, fetches, and what is known of the providers are shared by all of them.
    """

    def __init__(  # noqa: PLR0913 - what all models share
        self,
        settings: Settings,
        providers: Mapping[str, Provider],
        tiers: Tiers,
        upstreams: Upstreams,
        learned: LearnedDimensions,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._providers = providers
        self._tiers = tiers
        self._upstreams = upstreams
        self._learned = learned
        # Frozen there are none, and nobody is asked: each would do.
        frozen = settings.cache.mode == "frozen"
        self._usable = set(settings.providers) if frozen else set(providers)
        self._sleep = sleep
        self._in_flight = InFlight()
        self._widths: dict[str, int] = {}
        """By the label of a space with parameters, where the model's own width is not known."""
        self._learning: dict[str, _Learning] = {}
        """What is being bought to learn a width, by the label of the space."""
        self._unlisted: dict[str, Model] = {}
        """Models that were asked for by name, and whose own width is not known."""
        self.models = {name: self._make(name, entry) for name, entry in settings.models.items()}

    async def close(self) -> None:
        """End the calls under way, and keep what they bring.

        What is queued is dropped, and no call is made any more. Calls that were sent have
        `attempts.CLOSE_S` seconds to be answered; what comes is kept and billed. The store and the
        providers must be open until this returns.
        """
        await self._upstreams.tasks.close()
        await self._upstreams.attempts.close()
        await self._in_flight.close()

    def get(self, name: str) -> Model:
        """Return a model; one that is not configured if it may be asked for by name.

        Raises ModelUnknown.
        """
        model = self.models.get(name) or self._unlisted.get(name) or self._by_name(name)
        if not model.space.dimensions and (width := self._learned.get(model.space.name)):
            return self._keep(model, width)
        return model

    def rate_limit_waits(self) -> dict[str, dict[str, float]]:
        """Return, by provider, the seconds that calls of a model wait for its rate limit."""
        waits = {
            route.name: route.provider.rate_limit_waits()
            for model in self.models.values()
            for route in model.router.routes
            if isinstance(route.provider, HttpProvider)
        }
        return {name: models for name, models in sorted(waits.items()) if models}

    def other_models(self) -> dict[str, dict[str, int]]:
        """Return, by provider, how many of its replies named another model than was asked for."""
        routes = (route for model in self.models.values() for route in model.router.routes)
        found = {one.name: dict(getattr(one.provider, "other_models", {})) for one in routes}
        return {name: models for name, models in sorted(found.items()) if models}

    async def learn(
        self,
        model: Model,
        parameters: Mapping[str, object],
        inputs: Sequence[Input],
        context: Context,
    ) -> tuple[Model, Answered]:
        """Embed with a model whose width is not known yet; return what it is then, and the answer.

        One input is bought before the cache is asked, by the first request that comes, and the
        width pinned; it is kept like any other. Who asks meanwhile waits for that. Raises
        EmbeddingError.
        """
        space = model.space.with_parameters(parameters) if parameters else model.space
        await self._learned.refresh()
        if context.weigh is not None:
            context = replace(context, counts=await context.weigh(None), weigh=None)
        width, rounds = self._width(space), 0
        while not width:
            if not context.terms.spend:
                raise NotCached(context.terms, range(len(inputs)), len(inputs))
            learning = self._learning.get(space.label)
            if learning is None or (learning.abandonment.done() and not learning.begun):
                return await self._lead(model, space, inputs, context)
            is_same_key = learning.context.credential == context.credential
            if rounds >= MAX_ROUNDS_WITH_STRANGERS and not is_same_key:
                return await self._lead(model, space, inputs, context)
            started = time.time()
            await _wait(learning, context)
            if context.terms.joins_same_key and is_same_key:
                # What was bought meanwhile will do: it is in the cache by now.
                terms = replace(context.terms, max_age=time.time() - started + _CLOCK_S)
                context = replace(context, terms=terms)
            try:
                width, _ = learning.task.result()
            except EmbeddingError as error:
                if not learning.is_leader_specific(error, inputs[:1], context.credential):
                    raise
            rounds += 1
        model = self._with_width(model, space, width)
        space = replace(space, dimensions=width)
        return model, await model.embedder.embed(space, inputs, context)

    async def _lead(
        self, model: Model, space: Space, inputs: Sequence[Input], context: Context
    ) -> tuple[Model, Answered]:
        """Learn the width of a space from the first input, then ask for the others."""
        item, copies = inputs[0], inputs.count(inputs[0])
        # What has no bytes is refused before anybody is asked.
        keyring(space, Namespace(context.namespace)).key(item)
        work = partial(self._buy_first, model=model, space=space, copies=copies)
        learning: _Learning = SharedTask([item], work, context)
        self._learning[space.label] = learning
        self._in_flight.add_task(learning.task)
        learning.task.add_done_callback(lambda _: self._forget(space.label, learning))

        async def first(_: Sequence[Input]) -> Answered:
            nonlocal model, space
            await _wait(learning, context)
            width, answer = learning.task.result()
            model = self._with_width(model, space, width)
            space = replace(space, dimensions=width)
            return answer

        async def others(some: Sequence[Input]) -> Answered:
            return await model.embedder.embed(space, some, context)

        answer = await one_before_others(inputs, 0, first, others)
        return model, answer

    async def _buy_first(
        self, learning: _Learning, model: Model, space: Space, copies: int
    ) -> tuple[int, Answered]:
        """Buy one input of a space without a width, pin that, and keep the input."""
        context = learning.context

        def keep(bought: _Bought) -> asyncio.Task[Answered]:
            return self._in_flight.write(self._keep_first(space, bought, context, copies))

        bought = _Bought(learning.keys[0], context.on_charge, keep)
        told = replace(
            context,
            on_part=bought.take,
            on_charge=bought.charge,
            on_begin=learning.begin,
            abandoned=learning.abandonment,
        )
        try:
            try:
                await bought.take((0,), await model.source.embed(space, learning.keys, told))
            except EmbeddingError:
                # What comes when nobody waits for it any more is told as a part.
                if bought.kept is None:
                    raise
            return await bought.result()
        except EmbeddingError as error:
            if error.index is not None:
                learning.failed_key = learning.keys[0]
            # What was charged for nothing is counted under no width.
            bought.tell_charges(model.embedder.on_charge(space, context))
            await asyncio.shield(self._in_flight.write(self._tiers.flush_counts()))
            raise

    async def _keep_first(
        self, space: Space, bought: "_Bought", context: Context, copies: int
    ) -> Answered:
        """Pin the width of a space, and keep what was bought of it. Raises InvalidAnswer."""
        space = replace(space, dimensions=bought.width)
        if space.parameters:
            # A client's own fields may change the width: it holds for the same fields alone.
            self._widths[space.label] = space.dimensions
            if len(self._widths) > MOST_KEPT:
                del self._widths[next(iter(self._widths))]
        else:
            await self._learned.pin(space.name, space.dimensions)
        terms = replace(context.terms, max_age=0.0, joins_same_key=False)
        context = replace(context, terms=terms, deadline=None, on_charge=None)
        embedder = CachingEmbedder(bought, self._tiers, self._in_flight)
        return await embedder.embed(space, [bought.item] * copies, context)

    def _forget(self, label: str, learning: _Learning) -> None:
        if self._learning.get(label) is learning:
            del self._learning[label]

    def _width(self, space: Space) -> int:
        """Return the width of a space of a model whose own width was not known, 0 = not known."""
        if space.parameters:
            return self._widths.get(space.label, 0)
        return self._learned.get(space.name)

    def _with_width(self, model: Model, space: Space, width: int) -> Model:
        """Return a model that has learned its width, for requests with the fields of a space."""
        if space.parameters:
            return replace(model, space=replace(model.space, dimensions=width))
        return self._keep(model, width)

    def _by_name(self, name: str) -> Model:
        """Return what is known of a model that is not configured. Raises ModelUnknown."""
        if self._settings.server.unknown_models == "refuse":
            raise ModelUnknown(name)
        entry = model_entry.by_name(name)
        if entry is None:
            raise ModelUnknown(name)
        model = replace(self._make(name, entry), by_name=True)
        # A frozen proxy has no providers; what it has bought before may be of any model.
        if not model.usable and self._settings.cache.mode != "frozen":
            raise ModelUnknown(name)
        return self._keep_unlisted(model)

    def _keep(self, model: Model, width: int) -> Model:
        """Return a model that has learned its width; the next one who asks finds it so."""
        model = replace(model, space=replace(model.space, dimensions=width))
        if model.name in self.models or len(self.models) < MOST_KEPT:
            self.models[model.name] = model
            self._unlisted.pop(model.name, None)
        else:
            self._keep_unlisted(model)
        return model

    def _keep_unlisted(self, model: Model) -> Model:
        self._unlisted[model.name] = model
        if len(self._unlisted) > MOST_KEPT:
            del self._unlisted[next(iter(self._unlisted))]
        return model

    def _make(self, name: str, entry: model_entry.Model) -> Model:
        settings, upstreams = self._settings, self._upstreams
        router = make_router(settings, name, entry, self._providers, upstreams, sleep=self._sleep)
        source = NoneTooLong(scheduled(router, settings), entry.context)
        return Model(
            name=name,
            space=entry.as_space(),
            price=entry.price,
            router=router,
            source=source,
            embedder=CachingEmbedder(source, self._tiers, self._in_flight),
            dimensions_refused=entry.dimensions_refused,
            width=entry.width,
            context=entry.context,
            truncate_to=entry.truncate_to,
            fallbacks=entry.fallback,
            by_client=by_client(settings, name, entry, self._usable),
            neutral_fields=_neutral_fields(settings, entry),
        )


class _Bought:
    """One input that is bought past the cache; then the Embedder that gives the cache its answer.

    What was charged is told with the answer: by then it is known under which width it is counted.
    `keep` starts to keep the answer, which nothing ends early.
    """

    def __init__(
        self,
        item: Input,
        on_charge: OnCharge | None,
        keep: Callable[["_Bought"], asyncio.Task[Answered]],
    ) -> None:
        self.item = item
        self.kept: asyncio.Task[Answered] | None = None
        """Done when the answer, which has come, is kept."""
        self.width = 0
        self._keep = keep
        self._answer: Embedded | None = None
        self._on_charge = on_charge
        self._bills: list[Bill] = []
        self._count: OnCharge = self._bills.append

    async def take(self, places: Sequence[int], part: Embedded) -> None:  # noqa: ARG002 - OnPart
        """Take the answer, and return when it is kept."""
        if self.kept is None:
            self._answer, self.width = part, len(part.vectors[0]) // 4
            self.kept = self._keep(self)
        await asyncio.wait([self.kept])

    async def result(self) -> tuple[int, Answered]:
        """Return the width, and the answer as the cache gives it. Raises InvalidAnswer."""
        if self.kept is None:
            raise RuntimeError("nothing was bought")
        return self.width, await asyncio.shield(self.kept)

    def charge(self, bill: Bill) -> None:
        """Take a charge, and tell the client's `on_charge`."""
        if self._on_charge is not None:
            self._on_charge(bill)
        self._count(bill)

    def tell_charges(self, count: OnCharge) -> None:
        """Tell all charges so far, and each that comes later."""
        bills, self._bills = self._bills, []
        self._count = count
        for bill in bills:
            count(bill)

    async def embed(
        self,
        space: Space,  # noqa: ARG002 - that of the answer
        inputs: Sequence[Input],  # noqa: ARG002
        context: Context,
    ) -> Embedded:
        """Return the answer."""
        if context.on_charge is not None:
            self.tell_charges(context.on_charge)
        if self._answer is None:
            raise RuntimeError("nothing was bought")
        return self._answer


async def _wait(learning: _Learning, context: Context) -> None:
    """Wait for a width, until the deadline of a request at most. Raises DeadlineExceeded."""
    try:
        async with asyncio.timeout_at(context.deadline):
            await wait([learning])
    except TimeoutError as error:
        raise DeadlineExceeded("the time of the request was up") from error


def _neutral_fields(settings: Settings, entry: model_entry.Model) -> frozenset[str]:
    """Return what the providers of a model declare as neutral; each is sent its own only."""
    providers = (settings.providers.get(route.provider) for route in entry.routes)
    remote = (one for one in providers if one is not None and one.kind != kinds.LOCAL)
    return frozenset().union(*(one.as_profile().neutral_fields for one in remote))

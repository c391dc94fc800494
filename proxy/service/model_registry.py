"""The models that can be asked for: those configured, and others by their names alone."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from embedding_proxy.cache.cached_hit import CountedEmbeddings
from embedding_proxy.cache.embedder import CachingEmbedder
from embedding_proxy.cache.in_flight import InFlight
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers import registry
from embedding_proxy.providers.base import Context, Embedder, Input, Space
from embedding_proxy.providers.dimensions import MAX_DIMENSIONS
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.histogram import Histogram
from embedding_proxy.providers.openai_compatible import HttpProvider
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.routing.route import Provider
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.proxy.config.models import Fallback, ModelConfig, unlisted_model
from embedding_proxy.proxy.config.schema import Settings

from .budgets import BudgetCheck, Budgets
from .client_keys import ClientKeyPolicy, client_key_policy
from .learned_dimensions import LearnedDimensions, WidthLearner
from .provider_factory import make_router, make_scheduler

MAX_UNLISTED = 1000
"""Models that are listed at most; and as many that are not, being asked for by name alone."""


class ModelUnknown(InvalidRequest):
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
    reject_dimensions: bool = False
    """Whether `dimensions` is an error even at the native width, as for OpenAI's ada-002."""
    dimension_policy: str = "strict"
    """What may be done for a width that the model does not have: a policy, or a strategy."""
    max_input_tokens: int | None = None
    """Tokens an input may have; None = nothing is known of it."""
    truncate_to: int | None = None
    """Tokens to which an input is cut before the cache is asked; None = it is not cut."""
    fallbacks: tuple[Fallback, ...] = ()
    """Models of other spaces that may stand in when no route answers, in this order."""
    client_key_policy: ClientKeyPolicy | None = None
    """How it is asked for with the client's own key; None = it is not."""
    neutral_fields: frozenset[str] = frozenset()
    """Request fields that one of its providers declares to change no number."""
    by_name: bool = False
    """Whether nothing is known of it but its name."""

    @property
    def usable(self) -> bool:
        """Whether a provider is configured; without one, what is cached is still served."""
        return bool(self.router.routes)

    def with_dimensions(self, dimensions: int) -> "Model":
        """Return the model at a width that is asked of the upstream: a space of its own.

        Nothing says that a model known by name alone may be cut, so it is not.
        Raises InvalidRequest.
        """
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise InvalidRequest(
                f"Invalid value for 'dimensions' = {dimensions}: must be at least 1 and at most"
                f" {MAX_DIMENSIONS}.",
                param="dimensions",
            )
        name = f"{self.space.name}@{dimensions}"
        space = replace(self.space, name=name, dimensions=dimensions, send_dimensions=True)
        return replace(self, space=space)


class Registry:
    """Models by the names that clients use.

    Tiers, fetches, and what is known of the providers are shared by all of them.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what all models share
        self,
        settings: Settings,
        providers: Mapping[str, Provider],
        tiers: Tiers,
        upstreams: HealthRegistry,
        learned: LearnedDimensions,
        in_flight: InFlight | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        budgets: Budgets | None = None,
    ) -> None:
        """`budgets` is what clients with budgets have spent; None = nobody has one."""
        self._settings = settings
        self._budgets = budgets
        self._providers = providers
        self._tiers = tiers
        self._upstreams = upstreams
        self._learned = learned
        # Frozen there are none, and nobody is asked: each would do.
        frozen = settings.cache.mode == "frozen"
        self._usable_providers = set(settings.providers) if frozen else set(providers)
        self._sleep = sleep
        self.in_flight = InFlight() if in_flight is None else in_flight
        """The fetches of all models."""
        self._learner = WidthLearner(learned, tiers, self.in_flight)
        self._unlisted: dict[str, Model] = {}
        """Models that were asked for by name, and whose own width is not known."""
        self.models = {name: self._make(name, entry) for name, entry in settings.models.items()}

    async def close(self) -> None:
        """End the calls under way, and keep what they bring.

        What is queued is dropped, and no call is made any more. Calls that were sent have
        `attempts.CLOSE_S` seconds to be answered; what comes is kept and billed. The store and the
        providers must be open until this returns.
        """
        await self._upstreams.attempts.close()
        await self.in_flight.close()

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
        names = {other.name: dict(getattr(other.provider, "other_models", {})) for other in routes}
        return {name: models for name, models in sorted(names.items()) if models}

    def call_durations(self) -> dict[str, Histogram]:
        """Return, by provider, how long its calls took."""
        routes = (route for model in self.models.values() for route in model.router.routes)
        found = {one.name: getattr(one.provider, "durations", None) for one in routes}
        return {name: one for name, one in sorted(found.items()) if one is not None}

    async def learn(
        self,
        model: Model,
        parameters: Mapping[str, object],
        inputs: Sequence[Input],
        context: Context,
    ) -> tuple[Model, CountedEmbeddings]:
        """Embed with a model whose width is not known yet; return what it is then, and the answer.

        Raises EmbeddingError.
        """
        space = model.space.with_parameters(parameters) if parameters else model.space
        source, embedder = model.source, model.embedder
        width, answer = await self._learner.embed(source, embedder, space, inputs, context)
        if parameters:
            return replace(model, space=replace(model.space, dimensions=width)), answer
        return self._keep(model, width), answer

    def _by_name(self, name: str) -> Model:
        """Return what is known of a model that is not configured. Raises ModelUnknown."""
        if self._settings.server.unknown_models == "reject":
            raise ModelUnknown(name)
        entry = unlisted_model(name)
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
        if model.name in self.models or len(self.models) < MAX_UNLISTED:
            self.models[model.name] = model
            self._unlisted.pop(model.name, None)
        else:
            self._keep_unlisted(model)
        return model

    def _keep_unlisted(self, model: Model) -> Model:
        self._unlisted[model.name] = model
        if len(self._unlisted) > MAX_UNLISTED:
            del self._unlisted[next(iter(self._unlisted))]
        return model

    def _make(self, name: str, entry: ModelConfig) -> Model:
        settings, upstreams = self._settings, self._upstreams
        router = make_router(settings, name, entry, self._providers, upstreams, sleep=self._sleep)
        source = make_scheduler(router, settings, entry.max_input_tokens)
        if self._budgets is not None:
            prices = [route.price for route in router.routes]
            source = BudgetCheck(source, self._budgets, prices)
        return Model(
            name=name,
            space=entry.as_space(),
            price=entry.price,
            router=router,
            source=source,
            embedder=CachingEmbedder(source, self._tiers, self.in_flight),
            reject_dimensions=entry.reject_dimensions,
            dimension_policy=entry.dimension_policy,
            max_input_tokens=entry.max_input_tokens,
            truncate_to=entry.truncate_to,
            fallbacks=entry.fallback,
            client_key_policy=client_key_policy(settings, name, entry, self._usable_providers),
            neutral_fields=_neutral_fields(settings, entry),
        )


def _neutral_fields(settings: Settings, entry: ModelConfig) -> frozenset[str]:
    """Return what the providers of a model declare as neutral; each is sent its own only."""
    providers = (settings.providers.get(route.provider) for route in entry.routes)
    remote = (
        provider
        for provider in providers
        if provider is not None and provider.kind != registry.LOCAL
    )
    return frozenset().union(*(provider.as_profile().neutral_fields for provider in remote))

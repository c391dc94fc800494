"""EmbeddingService: what a configuration names, opened. For the app, the commands and your code.

::

    async with EmbeddingService.from_config("config.yaml") as service:
        result = await service.embed(["some text"], model="text-embedding-3-small", dimensions=256)
        result.vectors  # float32, shape (1, 256)

It knows which model is which space and where it can be bought; it knows no HTTP.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cache.embedder import CachingEmbedder, Filled
from cache.flight import Flights
from cache.memory import Memory
from cache.store import Store
from cache.tiers import TierCounters, Tiers
from providers import tokens, vector
from providers.base import Context, Embedded, Embedder, Input, InputRefused, Outcome, Space, Vector
from providers.kinds import HTTP_KINDS
from providers.local import Local
from providers.router import Provider, Route, Router

from . import settings as sections
from .config import load
from .settings import Settings

log = logging.getLogger("embedding_proxy.service")

MIB = 1 << 20
GIB = 1 << 30

# Up to this many token ids, decoding is quicker than handing it to a thread.
_DECODE_INLINE = 8192


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for."""

    name: str
    space: Space
    price: float
    """USD per million tokens."""
    embedder: Embedder
    usable: bool
    """Whether a provider is configured; without one, what is cached is still served."""
    dimensions_refused: bool = False
    """Whether `dimensions` is an error even at the native width, as for OpenAI's ada-002."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to n inputs, in their order."""

    model: Model
    space: Space
    native: Sequence[Vector]
    """n vectors at the model's own width, as bytes."""
    dimensions: int
    """The width that was asked for."""
    embedded: Embedded

    @property
    def vectors(self) -> vector.Floats:
        """The vectors as one array of float32, shape (n, dimensions)."""
        return vector.stack(vector.derive(self.native, self.dimensions))

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """How each input was answered."""
        return self.embedded.outcomes

    @property
    def tokens(self) -> int:
        """Prompt tokens of all inputs: what an uncached request would have been charged."""
        return sum(self.embedded.tokens)

    @property
    def tokens_billed(self) -> int:
        """Prompt tokens that were bought now."""
        return self.embedded.tokens_billed


class ModelUnknown(InputRefused):
    """No such model is configured or in the catalogue."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model `{model[:200]}` does not exist or you do not have access to it.",
            status=404,
            param="model",
            code="model_not_found",
        )


class EmbeddingService:
    """Embeds without HTTP. Open it with `async with`; use it from one event loop."""

    def __init__(
        self, settings: Settings, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """`sleep` waits between attempts at a provider, in seconds; tests inject a wait of zero."""
        self.settings = settings
        self._sleep = sleep
        self.models: dict[str, Model] = {}
        self._stack = AsyncExitStack()
        self._tiers: Tiers | None = None

    @classmethod
    def from_config(cls, path: str | Path | None = None) -> Self:
        """Return the service that a configuration file names, or the built-in configuration.

        Raises ConfigError.
        """
        return cls(load(None if path is None else Path(path)))

    async def __aenter__(self) -> Self:
        """Open the store and the providers. Raises StoreError if the directory cannot be used."""
        cache = self.settings.cache
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(
                Store(cache.directory, int(cache.size_limit_gib * GIB))
            )
            self._tiers = Tiers(Memory(int(cache.memory_mib * MIB)), store)
            providers = await _open_providers(self.settings, stack)
            self.models = self._make_models(providers)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def counters(self) -> TierCounters:
        """What the tiers have seen since the start."""
        return self._tiers.counters if self._tiers else TierCounters()

    def model(self, name: str) -> Model:
        """Return a model by the name clients use. Raises ModelUnknown."""
        try:
            return self.models[name]
        except KeyError:
            raise ModelUnknown(name) from None

    async def embed(
        self,
        inputs: Sequence[Input],
        model: str,
        *,
        dimensions: int | None = None,
        parameters: Mapping[str, object] | None = None,
        user: str | None = None,
    ) -> Result:
        """Embed 1…N inputs and return their vectors, the usage, and how each was answered.

        `dimensions` below the native width cuts and renormalises, for models that allow it.
        `parameters` are further request fields; they are sent on, and belong to the space.
        Raises EmbeddingError.
        """
        known = self.model(model)
        width = _width(known, dimensions)
        space = known.space.with_parameters(parameters) if parameters else known.space
        items = await _as_texts(inputs)
        now = asyncio.get_running_loop().time()
        context = Context(deadline=now + self.settings.server.request_timeout_s, user=user)
        embedded = await known.embedder.embed(space, items, context)
        return Result(known, space, embedded.vectors, width, embedded)

    def _make_models(self, providers: Mapping[str, Provider]) -> dict[str, Model]:
        flights: Flights[Filled] = Flights()
        models = {}
        for name, entry in self.settings.models.items():
            routes = [
                Route(providers[route.provider], route.model)
                for route in entry.routes
                if route.provider in providers
            ]
            router = Router(routes, unavailable=self._remedy(name, entry), sleep=self._sleep)
            if self._tiers is None:
                raise RuntimeError("the service is not open")
            models[name] = Model(
                name=name,
                space=Space(
                    name=entry.space,
                    dimensions=entry.dimensions,
                    matryoshka=entry.matryoshka,
                    tokenizer=entry.tokenizer,
                ),
                price=entry.price,
                embedder=CachingEmbedder(router, self._tiers, flights),
                usable=bool(routes),
                dimensions_refused=entry.dimensions_refused,
            )
        return models

    def _remedy(self, name: str, entry: sections.Model) -> str:
        """Say what to set so that the model can be asked for."""
        variables = []
        for route in entry.routes:
            configured = self.settings.providers.get(route.provider)
            if configured is not None and (variable := key_variable(configured)):
                variables.append(variable)
        if not variables:
            wanted = " or ".join(route.provider for route in entry.routes)
            return f"No provider for the model `{name}` is configured: add {wanted} to `providers`."
        return (
            f"No provider for the model `{name}` has a key:"
            f" set {' or '.join(variables)} and start the proxy again."
        )


def key_variable(provider: sections.Provider) -> str | None:
    """Return the name of the variable that holds a provider's key; None if it needs none."""
    kind = HTTP_KINDS.get(provider.kind)
    return (provider.api_key_env or kind.api_key_env) if kind else None


async def _open_providers(settings: Settings, stack: AsyncExitStack) -> dict[str, Provider]:
    """Open every provider that can be used; name the others in the log."""
    opened: dict[str, Provider] = {}
    for name, entry in settings.providers.items():
        if entry is None:
            continue
        kind = HTTP_KINDS.get(entry.kind)
        if kind is None:
            opened[name] = await stack.enter_async_context(Local(name))
            continue
        variable = entry.api_key_env or kind.api_key_env
        key = os.environ.get(variable, "").strip()
        if not key:
            log.warning("provider %s is skipped: %s is not set", name, variable)
            continue
        opened[name] = await stack.enter_async_context(
            kind(
                name,
                api_key=key,
                base_url=entry.base_url or kind.base_url,
                timeout_s=entry.timeout_s,
            )
        )
    return opened


def _width(model: Model, dimensions: int | None) -> int:
    """Return the width to answer with. Raises InputRefused for one this model cannot give."""
    native = model.space.dimensions
    if dimensions is None:
        return native
    if model.dimensions_refused or (not model.space.matryoshka and dimensions != native):
        raise InputRefused("This model does not support specifying dimensions.", param="dimensions")
    if not 1 <= dimensions <= native:
        raise InputRefused(
            f"Invalid value for 'dimensions' = {dimensions}: must be at least 1 and at most"
            f" {native} for this model.",
            param="dimensions",
        )
    return dimensions


async def _as_texts(inputs: Sequence[Input]) -> list[Input]:
    """Replace the token arrays that stand for a text by it; many at once in a thread."""
    if sum(len(item) for item in inputs if not isinstance(item, str)) <= _DECODE_INLINE:
        return [tokens.as_text(item) for item in inputs]
    return await asyncio.to_thread(lambda: [tokens.as_text(item) for item in inputs])

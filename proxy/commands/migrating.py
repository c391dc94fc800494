"""What a migration asks of the configuration: the model it goes to, and the one it comes from.

A model is named as a client names it, or with the provider before it that is to serve it:
`text-embedding-3-large`, `openrouter/openai/text-embedding-3-large`.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from embedding_proxy.providers import vector
from embedding_proxy.providers.base import InvalidAnswer, Space, Vector
from embedding_proxy.providers.limits import Limits, limits_of
from embedding_proxy.proxy.config import ConfigError
from embedding_proxy.proxy.embedding.opening import CLIENTS_PAY
from embedding_proxy.proxy.embedding.widths import can_give
from embedding_proxy.proxy.service import EmbeddingService
from embedding_proxy.proxy.settings.model_entry import ModelConfig as ModelEntry
from embedding_proxy.proxy.settings.schema import Settings

from .known import CostPreview
from .outliving import ShieldedTask

LONGEST_END_S = 120.0
"""How long answers are waited for when a run is stopped."""
CLIENT = "migrate"
"""On whose account the purchases of a migration go in the ledger."""


@dataclass(frozen=True, slots=True)
class Named:
    """A model as the command line names it."""

    asked: str
    """As it was named."""
    name: str
    entry: ModelEntry
    provider: str | None
    """The only one that may serve it; None = its routes in their order."""

    @property
    def space(self) -> Space:
        """The space of its vectors."""
        return self.entry.as_space()


def named(settings: Settings, text: str, option: str) -> Named:
    """Return the model that an option names. Raises ConfigError."""
    if (entry := settings.models.get(text)) is not None:
        return _known(Named(text, text, entry, None), option)
    provider, _, rest = text.partition("/")
    if rest and settings.providers.get(provider) is not None:
        for name, entry in settings.models.items():
            routes = [route for route in entry.routes if route.provider == provider]
            if routes and (name == rest or rest in {route.model for route in routes}):
                return _known(Named(text, name, entry, provider), option)
    near = difflib.get_close_matches(text, settings.models, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "`models` in the configuration can add it"
    raise ConfigError(f"{option}: there is no model {text!r}; {hint}")


def _known(model: Named, option: str) -> Named:
    if model.entry.dimensions is None:
        raise ConfigError(f"{option}: say how wide its vectors are: models.{model.name}.dimensions")
    return model


def width_of(model: Named, dimensions: int | None) -> int:
    """Return the width to migrate to; the native one if none is asked for. Raises ConfigError."""
    native = model.space.dimensions
    if dimensions is None:
        return native
    if not can_give(model.space, dimensions, "strict"):
        what = f"1 to {native}" if model.space.matryoshka else f"{native} and no other"
        raise ConfigError(f"--dimensions: {model.name} gives {what}")
    return dimensions


def settings_for(settings: Settings, model: Named) -> Settings:
    """Return the settings of a service that serves a migration. Raises ConfigError.

    No model of another space may stand in: its vectors would be lost among the others. Nor is what
    is embedded indexed, as what clients ask for is.
    """
    if settings.cache.mode in ("off", "refresh"):
        raise ConfigError(
            f"cache.mode: {settings.cache.mode}: a migration that is interrupted would buy again"
            " what it has bought; set normal"
        )
    routes = tuple(
        route for route in model.entry.routes if model.provider in (None, route.provider)
    )
    entry = model.entry.model_copy(update={"routes": routes, "fallback": ()})
    server = settings.server.model_copy(update={"canary_hours": None, "allow_oversize": True})
    models = {**settings.models, model.name: entry}
    index = settings.index.model_copy(update={"qdrant": None})
    return settings.model_copy(update={"server": server, "models": models, "index": index})


class Target:
    """The model that a migration goes to, behind our own cache and routes."""

    def __init__(
        self, service: EmbeddingService, model: Named, dimensions: int, namespace: str = ""
    ) -> None:
        self.name = model.name
        self.asked = model.asked
        self.space = model.space
        self.dimensions = dimensions
        self.seen_through = ShieldedTask()
        self._service = service
        self._namespace = namespace

    @property
    def unusable(self) -> str | None:
        """What to set before the model can be asked for; None if it can."""
        model = self._service.models[self.name]
        if model.by_client is not None and not model.by_client.others:
            provider = model.by_client.providers[0]
            return f"{self.name}: provider {provider} {CLIENTS_PAY}"
        return None if model.usable else model.router.unavailable

    @property
    def limits(self) -> Limits:
        """What the provider that is asked first takes; the usual where none can be asked."""
        routes = self._service.models[self.name].router.routes
        return limits_of(routes[0].provider) if routes else Limits()

    async def embed(
        self, texts: Sequence[str], *, anew: bool = False
    ) -> tuple[Sequence[Vector], int]:
        """Return a vector for each of 1…N texts, and how many were bought; `anew` buys all.

        Whoever is called off meanwhile finds them in the cache the next time. Raises
        EmbeddingError.
        """
        buying = self._service.embed(
            list(texts),
            self.name,
            dimensions=None if self.dimensions == self.space.dimensions else self.dimensions,
            namespace=self._namespace,
            client=CLIENT,
            cache_control="no-cache" if anew else "",
        )
        result = await self.seen_through(buying)
        if result.space != self.space or result.dimensions != self.dimensions:
            raise InvalidAnswer(result.space.name, "is not the space that was asked for")
        vectors = vector.derive(result.embedded.vectors, self.dimensions)
        return vectors, result.usage.misses

    async def finish(self) -> None:
        """Wait until all that was asked for is in the cache, or has failed."""
        await self.seen_through.over(LONGEST_END_S)

    async def look(self, texts: Sequence[str]) -> Sequence[CostPreview]:
        """Return what is known of each text; nothing is bought, and nothing changes."""
        return await self._service.look(texts, self.name, namespace=self._namespace)

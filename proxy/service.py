"""EmbeddingService: what a configuration names, opened. For the app, the commands and your code.

::

    async with EmbeddingService.from_config("config.yaml") as service:
        result = await service.embed(["some text"], model="text-embedding-3-small", dimensions=256)
        result.vectors  # float32, shape (1, 256)

It knows which model is which space and where it can be bought; it knows no HTTP.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from cache.memory import Memory
from cache.store import Store
from cache.tiers import TierCounters, Tiers
from providers import tokens, vector
from providers.base import Context, Embedded, Input, InvalidAnswer, Outcome, Space
from providers.health import Upstreams

from . import canary, fallback, widths, wire
from .cache_control import terms
from .canary import Canaries
from .config import load
from .learned import WIDTHS_FILE, Pins
from .opening import open_providers
from .registry import Model, Registry
from .settings import Settings
from .wire import EmbeddingRequest

MIB = 1 << 20
GIB = 1 << 30
DAY = 86_400

# Up to this many token ids, decoding is quicker than handing it to a thread.
_DECODE_INLINE = 8192


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to n inputs, in their order."""

    model: Model
    """The one that was asked for."""
    space: Space
    """Of the vectors: another than the model's only if `fallback` is true."""
    dimensions: int
    """The width that was asked for."""
    embedded: Embedded
    """The vectors at the model's own width, as bytes; tokens, outcomes, providers."""
    fallback: bool = False
    """Whether a model of another space stood in for the one that was asked for."""

    @property
    def vectors(self) -> vector.Floats:
        """The vectors as one array of float32, shape (n, dimensions)."""
        return vector.stack(vector.derive(self.embedded.vectors, self.dimensions))

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


class EmbeddingService:
    """Embeds without HTTP. Open it with `async with`; use it from one event loop."""

    def __init__(
        self, settings: Settings, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """`sleep` waits between attempts at a provider, in seconds; tests inject a wait of zero."""
        self.settings = settings
        self._sleep = sleep
        self._registry: Registry | None = None
        self.upstreams = Upstreams()
        """What is known of the providers: breakers, counters."""
        self.canaries: Canaries | None = None
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
            ttl_s = cache.ttl_days and cache.ttl_days * DAY
            size_limit = int(cache.size_limit_gib * GIB)
            store = await stack.enter_async_context(
                Store(
                    cache.directory,
                    size_limit,
                    ttl_s=ttl_s,
                    pinned=(*cache.pinned, canary.NAMESPACE),
                )
            )
            self._tiers = Tiers(Memory(int(cache.memory_mib * MIB), ttl_s), store)
            # Frozen, whoever would ask a provider finds none that could be paid.
            providers = {}
            if cache.mode != "frozen":
                providers = await open_providers(self.settings, stack, self._sleep)
            self._registry = Registry(
                self.settings,
                providers,
                self._tiers,
                self.upstreams,
                Pins(store.folder / WIDTHS_FILE),
                sleep=self._sleep,
            )
            if self.settings.server.canary_hours and cache.mode not in ("frozen", "off"):
                self.canaries = await stack.enter_async_context(
                    Canaries(
                        self._registry.models,
                        self.upstreams,
                        store.folder / "canaries.json",
                        hours=self.settings.server.canary_hours,
                    )
                )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def counters(self) -> TierCounters:
        """What the tiers have seen since the start."""
        return self._tiers.counters if self._tiers else TierCounters()

    @property
    def models(self) -> Mapping[str, Model]:
        """The models that are configured, or have been asked for by name; none before opening."""
        return self._registry.models if self._registry else {}

    async def embed(  # noqa: PLR0913 - the parameters of a request
        self,
        inputs: str | Sequence[str | int | Sequence[int]],
        model: str,
        *,
        dimensions: int | None = None,
        parameters: Mapping[str, object] | None = None,
        user: str | None = None,
        namespace: str = "",
        cache_control: str = "",
    ) -> Result:
        """Embed one text, one token array, or 1…2,048 texts or token arrays.

        `dimensions` below the native width cuts and renormalises, for models that allow it.
        `parameters` are further request fields; they are sent on, and belong to the space.
        `namespace` is the part of the cache to look in and to keep in.
        `cache_control` is what a client would say in the header of that name: "no-cache".
        Raises EmbeddingError.
        """
        if not isinstance(inputs, str):
            inputs = [item if isinstance(item, str | int) else list(item) for item in inputs]
        asked = EmbeddingRequest(
            model=model,
            inputs=wire.parse_input(inputs),
            dimensions=dimensions,
            encoding="base64",
            user=user,
            parameters=parameters or {},
        )
        return await self.answer(asked, namespace, cache_control)

    async def answer(
        self, asked: EmbeddingRequest, namespace: str = "", control: str = ""
    ) -> Result:
        """Answer a well-formed request, by a model that stands in for its own if need be.

        `control` is its `Cache-Control`. Raises EmbeddingError.
        """
        if self._registry is None:
            raise RuntimeError("the service is not open")
        model = self._registry.get(asked.model)
        if model.by_name and asked.dimensions is not None:
            model = model.at(asked.dimensions)
        inputs = await _as_texts(asked.inputs)
        deadline = asyncio.get_running_loop().time() + self.settings.server.request_timeout_s
        allowed = terms(self.settings.cache.mode, control)
        context = Context(deadline, asked.user, namespace, allowed)
        if not model.space.dimensions:
            model, embedded = await self._registry.learn(model, asked.parameters, inputs, context)
            space = model.space.with_parameters(asked.parameters)
            return _result(model, space, _width(model, asked), embedded)
        width = _width(model, asked)

        async def ask(one: Model, by: float) -> Result:
            space = one.space
            if asked.parameters:
                space = space.with_parameters(asked.parameters)
            embedded = await one.embedder.embed(space, inputs, replace(context, deadline=by))
            return _result(model, space, width, embedded, fallback=one is not model)

        models = [model, *fallback.stand_ins(model, self.models, width)]
        return await fallback.first_answer(ask, models, deadline)


def _width(model: Model, asked: EmbeddingRequest) -> int:
    """Return the width to answer with. Raises InputRefused."""
    refused = model.dimensions_refused
    return widths.chosen(model.space, asked.dimensions, model.width, refused=refused)


def _result(
    model: Model, space: Space, width: int, embedded: Embedded, *, fallback: bool = False
) -> Result:
    """Return an answer of which every vector can be brought to the width. Raises InvalidAnswer."""
    if width < space.dimensions:
        try:
            vector.check_heads(embedded.vectors, width)
        except vector.VectorError as error:
            raise InvalidAnswer(space.name, f"a vector cannot be cut: {error}") from error
    return Result(model, space, width, embedded, fallback)


async def _as_texts(inputs: Sequence[Input]) -> list[Input]:
    """Replace the token arrays that stand for a text by it; many at once in a thread."""
    if sum(len(item) for item in inputs if not isinstance(item, str)) <= _DECODE_INLINE:
        return [tokens.as_text(item) for item in inputs]
    return await asyncio.to_thread(lambda: [tokens.as_text(item) for item in inputs])

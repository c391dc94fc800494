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
from pathlib import Path
from typing import Self

from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Namespace
from embedding_proxy.cache.ledger import MAX_HEADINGS, By, Heading, Line, Reusable
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.tiered import TierCounters, Tiers
from embedding_proxy.cache.usage import Usage
from embedding_proxy.providers.base import Input
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.slices import SLICE
from embedding_proxy.proxy.commands.known import CostPreview, preview_cost
from embedding_proxy.proxy.embedding.answering import EmbeddingPipeline
from embedding_proxy.proxy.embedding.bringing import apply_dimension_strategy
from embedding_proxy.proxy.embedding.canary import DriftCheck
from embedding_proxy.proxy.embedding.client_keys import ClientKeys
from embedding_proxy.proxy.embedding.indexing import Indexing
from embedding_proxy.proxy.embedding.learned import WIDTHS_FILE, LearnedDimensions
from embedding_proxy.proxy.embedding.opening import open_providers
from embedding_proxy.proxy.embedding.questions import SearchMixin
from embedding_proxy.proxy.embedding.registry import Model, Registry
from embedding_proxy.proxy.embedding.result import Result
from embedding_proxy.proxy.http.caller import Client, Secret
from embedding_proxy.proxy.settings.schema import Settings

from . import wire
from .config import load
from .embedding import canary, indexing
from .embedding.request_fields import classify
from .http import index_field
from .http.index_field import NO_INDEX_OPTIONS, IndexOptions
from .wire import EmbeddingRequest

MIB = 1 << 20
GIB = 1 << 30
DAY = 86_400
REPLIES_SHARE = 0.5
"""The part of the memory that is left to whole replies (see `http.response_cache`)."""


class EmbeddingService(SearchMixin):
    """Embeds without HTTP. Open it with `async with`; use it from one event loop."""

    def __init__(
        self, settings: Settings, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """`sleep` waits between attempts at a provider, in seconds; tests inject a wait of zero."""
        self.settings = settings
        self._sleep = sleep
        self._registry: Registry | None = None
        self._answering: EmbeddingPipeline | None = None
        self.upstreams = HealthRegistry()
        """What is known of the providers: breakers, counters."""
        self.canaries: DriftCheck | None = None
        self.indexing: Indexing | None = None
        """What goes to Qdrant; None where none is configured."""
        self._stack = AsyncExitStack()
        self._tiers: Tiers | None = None
        self._store: Store | None = None

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
            pinned = (*cache.pinned, canary.NAMESPACE)
            store = await stack.enter_async_context(
                Store(
                    cache.directory,
                    size_limit,
                    ttl_s=ttl_s,
                    # Frozen, nothing could be bought again.
                    deletes_expired=cache.mode != "frozen",
                    pinned=pinned,
                )
            )
            self._store = store
            memory = Memory(int(cache.memory_mib * MIB * (1 - REPLIES_SHARE)), ttl_s)
            self._tiers = Tiers(memory, store)
            # Frozen, whoever would ask a provider finds none that could be paid.
            providers = {}
            if cache.mode != "frozen":
                providers = await open_providers(self.settings, stack, self._sleep)
            learned = LearnedDimensions(store.folder / WIDTHS_FILE)
            await learned.refresh()
            self._registry = Registry(
                self.settings,
                providers,
                self._tiers,
                self.upstreams,
                learned,
                sleep=self._sleep,
            )
            stack.push_async_callback(self._registry.close)
            client_keys = None
            if any(one.by_client for one in self.settings.providers.values() if one):
                client_keys = ClientKeys(self.settings, store.folder)
            self._answering = EmbeddingPipeline(self.settings, self._registry, client_keys)
            if self.settings.index.qdrant is not None:
                self.indexing = await stack.enter_async_context(
                    Indexing(
                        self.settings, self.settings.index.qdrant, cache.directory, self._sleep
                    )
                )
            if self.settings.server.canary_hours and cache.mode not in ("frozen", "off"):
                self.canaries = await stack.enter_async_context(
                    DriftCheck(
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
    def counted(self) -> Mapping[Heading, Usage]:
        """The sums of the ledger that this process has added since the start."""
        return self._store.counted if self._store else {}

    async def ledger(self, by: Sequence[By]) -> list[Line] | None:
        """Return the sums since ever, of all processes; None while they cannot be read.

        At most MAX_HEADINGS lines, and one for each provider with what is left: what is configured
        comes first, then what was counted first.
        """
        if self._store is None:
            return None
        server = self.settings.server
        namespaces = ["", canary.NAMESPACE, *(key.namespace for key in server.keys)]
        named = {By.MODEL: list(self.settings.models), By.NAMESPACE: namespaces}
        preferred = {column: names for column, names in named.items() if column in by}
        return await self._store.ledger(by, MAX_HEADINGS, preferred)

    @property
    def models(self) -> Mapping[str, Model]:
        """The models that are configured, or have been asked for by name; none before opening."""
        return self._registry.models if self._registry else {}

    @property
    def rate_limit_waits(self) -> dict[str, dict[str, float]]:
        """Seconds that calls wait for a rate limit, by provider and its own name for the model."""
        return self._registry.rate_limit_waits() if self._registry else {}

    @property
    def other_models(self) -> dict[str, dict[str, int]]:
        """How many replies of a provider named another model than was asked for, by both names."""
        return self._registry.other_models() if self._registry else {}

    @property
    def most_inputs(self) -> int | None:
        """How many inputs a request may have; None = any number."""
        return None if self.settings.server.allow_oversize else wire.MOST_INPUTS

    async def embed(  # noqa: PLR0913 - the parameters of a request
        self,
        inputs: str | Sequence[str | int | Sequence[int]],
        model: str,
        *,
        dimensions: int | None = None,
        parameters: Mapping[str, object] | None = None,
        user: str | None = None,
        namespace: str = "",
        client: str = "",
        api_key: str = "",
        cache_control: str = "",
        index: object = None,
    ) -> Result:
        """Embed one text, one token array, or several texts or token arrays.

        `dimensions` below the native width cuts and renormalises, for models that allow it.
        `parameters` are further request fields, treated as a client's: see `request_fields`.
        `namespace` is the part of the cache to look in and to keep in; `client` is for the bill.
        `api_key` is the client's own, for providers with `key: client`.
        `cache_control` is what a client would say in the header of that name: "no-cache".
        `index` is what a client would say in the field of that name: False, or a mapping.
        Raises EmbeddingError.
        """

        def parse() -> list[Input]:
            if isinstance(inputs, str):
                return wire.parse_input(inputs)
            plain = [item if isinstance(item, str | int) else list(item) for item in inputs]
            return wire.parse_input(plain, self.most_inputs)

        parsed = parse() if len(inputs) <= SLICE else await asyncio.to_thread(parse)
        given = {name: one for name, one in (parameters or {}).items() if one is not None}
        further = classify(given)
        asked = EmbeddingRequest(
            model=model,
            inputs=parsed,
            dimensions=dimensions,
            encoding="base64",
            user=user,
            parameters=further.parameters,
            neutral=further.neutral,
            index=index_field.parse_index_options(index, len(parsed)),
        )
        return await self.answer(asked, Client(namespace, client, Secret(api_key)), cache_control)

    async def look(
        self, inputs: Sequence[str], model: str, *, namespace: str = ""
    ) -> list[CostPreview]:
        """Return what is known of texts before anything is bought. Raises EmbeddingError."""
        if self._registry is None or self._tiers is None:
            raise RuntimeError("the service is not open")
        return await preview_cost(
            self._registry.get(model), self._tiers, inputs, Namespace(namespace)
        )

    def at_hand(self, asked: EmbeddingRequest, caller: Client, control: str) -> Result | None:
        """Return what `answer` would, already counted, if it need not be waited for; else None.

        Raises EmbeddingError.
        """
        if self._answering is None or asked.index != NO_INDEX_OPTIONS:
            return None
        result = self._answering.at_hand(asked, caller, control)
        if result is None or result.embedded.again is None:
            return None
        if self.indexing is not None and not self.indexing.knows(asked.index, result):
            return None
        result.embedded.again.count()
        return result

    def again(self, result: Result, index: IndexOptions) -> Reusable | None:
        """Return what gives this answer to the same request once more; None to have it asked anew.

        What stood in may not be needed again; and points that are not known to be indexed are.
        """
        again = None if result.fallback else result.embedded.again
        if self.indexing is None or again is None:
            return again
        return self.indexing.again(again, index, result)

    async def answer(self, asked: EmbeddingRequest, caller: Client, control: str = "") -> Result:
        """Answer a well-formed request, by a model that stands in for its own if need be.

        What is answered is indexed where the configuration says so. `control` is its
        `Cache-Control`. Raises EmbeddingError.
        """
        unable = indexing.refused(self.settings, asked.index)
        if unable is not None:
            raise unable
        if self._answering is None:
            raise RuntimeError("the service is not open")
        result = await apply_dimension_strategy(
            await self._answering.answer(asked, caller, control)
        )
        if self.indexing is not None:
            await self.indexing.take(asked.index, control, result)
        return result

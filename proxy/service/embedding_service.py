"""EmbeddingService: an opened configuration. For the app, the commands and library users.

::

    async with EmbeddingService.from_config("config.yaml") as service:
        result = await service.embed(["some text"], model="text-embedding-3-small", dimensions=256)
        result.vectors  # float32, shape (1, 256)

It knows which model belongs to which space and where it can be bought; it knows no HTTP.
`SearchMixin` adds similarities and searches, for library users; the proxy has no such routes.
Texts that are embedded for these are not indexed.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from embedding_proxy.cache.cached_hit import Reusable
from embedding_proxy.cache.key import Namespace
from embedding_proxy.cache.ledger import (
    MAX_LEDGER_KEYS,
    NOTHING,
    By,
    LedgerFilter,
    LedgerKey,
    Line,
    Usage,
)
from embedding_proxy.cache.tiers import TierCounters
from embedding_proxy.index.collection import Provenance
from embedding_proxy.index.errors import OtherSpace
from embedding_proxy.index.search import SearchHit, search
from embedding_proxy.providers import similarity
from embedding_proxy.providers.base import SLICE, Input
from embedding_proxy.providers.dimensions import derive
from embedding_proxy.providers.histogram import Histogram
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.proxy.config.loader import ConfigError, load
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.request_fields import classify

from . import drift_check, index_writes, request
from .client_keys import ClientKeys
from .drift_check import DriftCheck
from .dual_writes import DualWrites
from .embedding_result import Result
from .index_options import NO_INDEX_OPTIONS, IndexOptions, parse_index_options
from .index_writes import IndexWrites, collection_of
from .inputs import CostPreview, preview_cost
from .model_registry import Model, Registry
from .pipeline import EmbeddingPipeline, apply_dimension_strategy, space_of
from .provider_factory import open_providers
from .request import (
    MAX_INPUTS,
    Client,
    EmbeddingRequest,
    Inputs,
    Secret,
    convert_input,
    parse_input,
    parse_text,
    parse_texts,
)
from .storage import Storage, make_storage


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A text, and how near it is to the one that was asked about."""

    place: int
    """In the list that was given."""
    text: str
    score: float
    """The cosine."""


class SearchMixin(ABC):
    """Similarities and searches over whatever embeds."""

    settings: Settings
    indexing: IndexWrites | None

    @abstractmethod
    async def embed(
        self,
        inputs: Inputs,
        model: str,
        *,
        dimensions: int | None = None,
        parameters: Mapping[str, object] | None = None,
        index: object = None,
    ) -> Result:
        """Embed one input or several. Raises EmbeddingError."""

    async def similarity(
        self, one: str, other: str, model: str, *, dimensions: int | None = None
    ) -> float:
        """Return the cosine between two texts, -1…1. Raises EmbeddingError."""
        pair = [parse_text(one), parse_text(other)]
        result = await self.embed(pair, model, dimensions=dimensions, index=False)
        return float(result.similarity()[0, 1])

    async def nearest(
        self, query: str, texts: Iterable[str], k: int, model: str, *, dimensions: int | None = None
    ) -> list[Neighbour]:
        """Return the k texts that are nearest to a query, the nearest first; of equals the earlier.

        Raises EmbeddingError.
        """
        query, texts, k = parse_text(query), parse_texts(texts), request.parse_count("k", k, 0)
        if not texts:
            return []
        result = await self.embed([query, *texts], model, dimensions=dimensions, index=False)
        first, *rows = derive(result.embedded.vectors, result.dimensions)
        ranked = similarity.ranked(first, rows, k)
        return [Neighbour(index, texts[index], score) for index, score in ranked]

    async def query(  # noqa: PLR0913 - a question's parts, by name
        self,
        text: str,
        model: str,
        limit: int = 10,
        *,
        collection: str | None = None,
        dimensions: int | None = None,
        parameters: Mapping[str, object] | None = None,
        stored: Mapping[str, object] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> list[SearchHit]:
        """Return what is nearest to a text in the collection of the model's space in Qdrant.

        It is the collection that the answers of this model, width and parameters are indexed into,
        unless one is named; one that holds vectors of another space or width is never searched.
        `stored` are the parameters of the vectors there, where they are others than the query's
        `parameters`, and the model is made for that: `input_type` "document" and "query". `where`
        is a filter in Qdrant's JSON. Raises EmbeddingError, QdrantFailure, and ConfigError without
        `index.qdrant`.
        """
        if self.indexing is None or self.settings.index.qdrant is None:
            message = "is not set, so there is nothing to search; set its url"
            raise ConfigError(self.settings.problem(("index", "qdrant"), message))
        text, limit = parse_text(text), request.parse_count("limit", limit)
        result = await self.embed(
            text, model, dimensions=dimensions, parameters=parameters, index=False
        )
        if result.fallback:
            raise OtherSpace(
                f"{result.name} stood in for {model}: its vectors compare with none of the"
                f" collection's; ask again when {model} answers"
            )
        space = result.space
        if stored is not None:
            space = result.model.space.with_parameters(stored)
            if result.space.name != space.name:
                space = space_of(result.model.dimension_policy, space, result.dimensions)
        qdrant = self.settings.index.qdrant
        name = collection or qdrant.collection
        name = name or collection_of(result.name, space, result.dimensions, qdrant)
        (numbers,) = derive(result.embedded.vectors, result.dimensions)
        return await search(
            await self.indexing.indexer.connection(),
            name,
            Provenance(space.label, result.dimensions),
            numbers,
            limit=limit,
            where=where,
            options=index_writes.collection_options(qdrant),
            names=self.indexing.names,
        )


class EmbeddingService(SearchMixin):
    """Embeds without HTTP. Open it with `async with`; use it from one event loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        storage: Storage | None = None,
    ) -> None:
        """`sleep` waits between attempts at a provider, in seconds; tests inject a wait of zero.

        `storage` is one that another service holds, of an equal cache section.
        """
        self.settings = settings
        self._sleep = sleep
        self._registry: Registry | None = None
        self._answering: EmbeddingPipeline | None = None
        self.upstreams = HealthRegistry()
        """What is known of the providers: breakers, counters."""
        self.drift_check: DriftCheck | None = None
        self.indexing: IndexWrites | None = None
        """What goes to Qdrant; None where none is configured."""
        self._dual_writes: DualWrites | None = None
        self.namespaces: Callable[[], Iterable[str]] = lambda: [
            key.namespace for key in settings.server.keys
        ]
        """Gives those that are configured: they come first in the ledger."""
        self._stack = AsyncExitStack()
        self._storage = storage

    def successor(self, settings: Settings) -> "EmbeddingService":
        """Return a service of other settings, to be opened while this one is open.

        It uses the same storage if the cache section is the same.
        """
        storage = self._storage
        is_same = storage is not None and storage.cache == settings.cache
        return EmbeddingService(settings, sleep=self._sleep, storage=storage if is_same else None)

    async def drain(self) -> None:
        """Wait for all purchases under way to end by themselves."""
        if self._registry is not None:
            await self._registry.in_flight.drain()

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
            self._storage = await stack.enter_async_context(
                self._storage or make_storage(self.settings)
            )
            store, tiers = self._storage.store, self._storage.tiers
            # Frozen, whoever would ask a provider finds none that could be paid.
            providers = {}
            if cache.mode != "frozen":
                membership = self._storage.membership
                allowance = None if membership is None else membership.allowance
                providers = await open_providers(self.settings, stack, self._sleep, allowance)
            self._registry = Registry(
                self.settings,
                providers,
                tiers,
                self.upstreams,
                self._storage.learned,
                self._storage.in_flight.successor(),
                sleep=self._sleep,
                budgets=self._storage.budgets,
            )
            stack.push_async_callback(self._registry.close)
            client_keys = None
            if any(
                provider.uses_client_key
                for provider in self.settings.providers.values()
                if provider
            ):
                client_keys = ClientKeys(self.settings, store.folder)
            self._answering = EmbeddingPipeline(self.settings, self._registry, client_keys)
            if self.settings.index.qdrant is not None:
                self.indexing = await stack.enter_async_context(
                    IndexWrites(
                        self.settings, self.settings.index.qdrant, cache.directory, self._sleep
                    )
                )
                self._dual_writes = DualWrites(
                    self.settings,
                    self.settings.index.qdrant,
                    self.indexing.names,
                    self._embed_again,
                )
                stack.push_async_callback(self._dual_writes.close)
            if self.settings.server.drift_check_hours and cache.mode not in ("frozen", "off"):
                self.drift_check = await stack.enter_async_context(
                    DriftCheck(
                        self._registry.models,
                        self.upstreams,
                        store.folder / "canaries.json",
                        hours=self.settings.server.drift_check_hours,
                    )
                )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def storage(self) -> Storage | None:
        """What is stored, which other services may use too; None before opening."""
        return self._storage

    @property
    def counters(self) -> TierCounters:
        """What the tiers have seen since the start."""
        return self._storage.tiers.counters if self._storage else TierCounters()

    @property
    def counted(self) -> Mapping[LedgerKey, Usage]:
        """The sums of the ledger that this process has added since the start."""
        return self._storage.store.counted if self._storage else {}

    async def ledger(self, by: Sequence[By]) -> list[Line] | None:
        """Return the sums since ever, of all processes; None while they cannot be read.

        At most MAX_LEDGER_KEYS lines, and one for each provider with what is left: what is
        configured comes first, then what was counted first.
        """
        if self._storage is None:
            return None
        namespaces = ["", drift_check.NAMESPACE, *self.namespaces()]
        named = {By.MODEL: list(self.settings.models), By.NAMESPACE: namespaces}
        preferred = {column: names for column, names in named.items() if column in by}
        return await self._storage.store.ledger(by, MAX_LEDGER_KEYS, preferred)

    async def client_ledger(self, client: str) -> Usage | None:
        """Return the sums of a client since ever; None while the ledger cannot be read."""
        if self._storage is None:
            return None
        lines = await self._storage.store.ledger([], lines=LedgerFilter(client))
        return None if lines is None else next((usage for _, usage in lines), NOTHING)

    async def billed(self, caller: Client) -> int:
        """Return the nanodollars that a client with a budget was billed in the present period."""
        if self._storage is None or caller.limit is None:
            return 0
        return await self._storage.budgets.billed(caller.client, caller.limit)

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
    def call_durations(self) -> dict[str, Histogram]:
        """How long calls took, by provider, since the start."""
        return self._registry.call_durations() if self._registry else {}

    @property
    def evicted(self) -> int:
        """How many entries this process has evicted from disk."""
        return self._storage.store.evicted if self._storage else 0

    @property
    def unwritten(self) -> int:
        """How many records wait for the disk."""
        return self._storage.store.unwritten if self._storage else 0

    @property
    def max_inputs(self) -> int | None:
        """How many inputs a request may have; None = any number."""
        return None if self.settings.server.allow_oversize else MAX_INPUTS

    async def embed(  # noqa: PLR0913 - the parameters of a request
        self,
        inputs: Inputs,
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
        `api_key` is the client's own, for providers with `auth: client`.
        `cache_control` is what a client would say in the header of that name: "no-cache".
        `index` is what a client would say in the field of that name: False, or a mapping.
        Raises EmbeddingError.
        """
        further = classify(request.parse_parameters(parameters))
        caller = Client(
            request.parse_string("namespace", namespace),
            request.parse_string("client", client),
            Secret(request.parse_string("api_key", api_key)),
        )
        control = request.parse_string("cache_control", cache_control)
        model = request.parse_model(model)
        dimensions = request.parse_dimensions(dimensions)
        user = None if user is None else request.parse_string("user", user)

        def parse() -> list[Input]:
            return parse_input(convert_input(inputs), self.max_inputs)

        is_long = isinstance(inputs, list | tuple) and len(inputs) > SLICE
        parsed = await asyncio.to_thread(parse) if is_long else parse()
        embedding_request = EmbeddingRequest(
            model=model,
            inputs=parsed,
            dimensions=dimensions,
            encoding="base64",
            user=user,
            parameters=further.parameters,
            neutral=further.neutral,
            index=parse_index_options(index, len(parsed)),
        )
        return await self.answer(embedding_request, caller, control)

    async def _embed_again(
        self,
        inputs: Sequence[Input],
        model: str,
        dimensions: int | None,
        index: IndexOptions,
        client: Client,
    ) -> Result:
        """Embed inputs with another model, and index them. Raises EmbeddingError."""
        further = classify({})
        inputs_again = EmbeddingRequest(
            model=model,
            inputs=list(inputs),
            dimensions=dimensions,
            encoding="base64",
            user=None,
            parameters=further.parameters,
            neutral=further.neutral,
            index=index,
        )
        return await self.answer(inputs_again, client)

    async def preview(
        self, inputs: Iterable[str], model: str, *, namespace: str = ""
    ) -> list[CostPreview]:
        """Return what is known of texts before anything is bought. Raises EmbeddingError."""
        if self._registry is None or self._storage is None:
            raise RuntimeError("the service is not open")
        return await preview_cost(
            self._registry.get(model),
            self._storage.tiers,
            parse_texts(inputs),
            Namespace(namespace),
        )

    def embed_from_cache(
        self, embedding_request: EmbeddingRequest, caller: Client, control: str
    ) -> Result | None:
        """Return what `answer` would, already counted, if nothing has to be waited for; else None.

        Raises EmbeddingError.
        """
        if self._answering is None or embedding_request.index is not NO_INDEX_OPTIONS:
            return None
        result = self._answering.embed_from_cache(embedding_request, caller, control)
        if result is None or result.embedded.cached_hit is None:
            return None
        if self.indexing is not None and not self.indexing.knows(embedding_request.index, result):
            return None
        result.embedded.cached_hit.count()
        return result

    def reusable(self, result: Result, index: IndexOptions) -> Reusable | None:
        """Return what gives this answer to the same request once more; None to have it asked anew.

        What stood in may not be needed again; and points that are not known to be indexed are.
        """
        cached_hit = None if result.fallback else result.embedded.cached_hit
        if self.indexing is None or cached_hit is None:
            return cached_hit
        return self.indexing.reusable(cached_hit, index, result)

    async def answer(
        self, embedding_request: EmbeddingRequest, caller: Client, control: str = ""
    ) -> Result:
        """Answer a well-formed request, by a fallback model where no route of its own answers.

        What is answered is indexed where the configuration says so. `control` is its
        `Cache-Control`. Raises EmbeddingError.
        """
        index_writes.check_index_options(self.settings, embedding_request.index)
        if self._answering is None:
            raise RuntimeError("the service is not open")
        result = await apply_dimension_strategy(
            await self._answering.answer(embedding_request, caller, control)
        )
        if self.indexing is not None:
            is_new = not self.indexing.knows(embedding_request.index, result)
            await self.indexing.take(embedding_request.index, control, result)
            if is_new and self._dual_writes is not None:
                await self._dual_writes.take(embedding_request.index, control, caller, result)
        return result

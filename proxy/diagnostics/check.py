"""Finds out, before the first request, whether what a configuration names works. Prints nothing.

- Routes: each is asked for known texts; all routes of one space must give the same vectors.
- Providers: without one that can be asked, every cache miss fails.
- Qdrant: whether points can be written to its collections, by writing one.
- The shared tier: whether records can be written and read, by writing one.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from uuid import uuid4

from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import Provenance, ensure
from embedding_proxy.index.errors import Denied, InUse, QdrantFailure
from embedding_proxy.index.point import QueuedPoint
from embedding_proxy.index.upsert import upsert
from embedding_proxy.providers import local, registry, tokens, vector
from embedding_proxy.providers.base import Context
from embedding_proxy.providers.errors import AuthenticationError, EmbeddingError, ModelNotFound
from embedding_proxy.providers.route_check import SAME, TEXTS, probe
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.proxy.config.index import Qdrant
from embedding_proxy.proxy.config.loader import Configuration
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service import index_writes
from embedding_proxy.proxy.service.provider_factory import CLIENTS_PAY
from embedding_proxy.proxy.service.storage import shared_tier

from .routes import (
    Comparison,
    ModelSelection,
    ProviderStatus,
    RouteResult,
    add_fallback_models,
    compare,
    find_routes,
)

MAX_PROVIDERS_AT_ONCE = 8
"""Providers that are asked at the same time, each for one model after the other: so the times are
those of single calls, and a small machine need not load several models at once."""
QDRANT_TIMEOUT_S = 10.0
SHARED_LIMIT_S = 1.0


@dataclass(slots=True)
class Checkup:
    """What was found."""

    providers: Mapping[str, ProviderStatus]
    results: list[RouteResult]
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line for each thing that does not work."""


async def examine(
    settings: Settings, choice: ModelSelection, *, offline: bool, tell: Callable[[float], None]
) -> Checkup:
    """Ask every usable route of the chosen models, unless `offline`. Raises ConfigError.

    `tell` is told how many routes have been asked.
    """
    choice = replace(choice, named=add_fallback_models(settings, choice.named))
    async with AsyncExitStack() as stack:
        candidates = await find_routes(settings, choice, stack)
        found = Checkup(candidates.statuses, candidates.results)
        if not offline:
            await _probe_routes(found.results, settings.server.request_timeout_s, tell)
    for one in found.results:
        if one.probe is not None:
            failure = one.probe.failure
            one.why = "" if failure is None else _failure_reason(settings, choice, one, failure)
    found.comparisons = list(compare(found.results))
    found.problems = list(_problems(choice, candidates.routers, found))
    return found


async def _probe_routes(
    results: Sequence[RouteResult], patience_s: float, tell: Callable[[float], None]
) -> None:
    clock = asyncio.get_running_loop().time
    gate = asyncio.Semaphore(MAX_PROVIDERS_AT_ONCE)
    queues: defaultdict[str, list[tuple[RouteResult, Route]]] = defaultdict(list)
    for one in results:
        if one.route is not None:
            queues[one.provider].append((one, one.route))
    for encoding in {one.space.tokenizer for one in results if one.space.tokenizer}:
        # To load a vocabulary takes 0.1 s, which are no provider's.
        tokens.count(TEXTS, encoding)
    done = 0

    async def ask_in_turn(queue: Sequence[tuple[RouteResult, Route]]) -> None:
        nonlocal done
        async with gate:
            for one, route in queue:
                context = Context(clock() + patience_s)
                one.probe = await probe(route, one.space, context, clock)
                done += 1
                tell(done)

    async with asyncio.TaskGroup() as group:
        for queue in queues.values():
            group.create_task(ask_in_turn(queue))


def _failure_reason(
    settings: Settings, choice: ModelSelection, one: RouteResult, failure: EmbeddingError
) -> str:
    """Say why a route failed, and what may be done."""
    why = str(failure).removeprefix(f"{one.provider}: ")
    entry = settings.providers[one.provider]
    if isinstance(failure, AuthenticationError) and entry and entry.key_variable:
        why += f" (its key is that in {entry.key_variable})"
    if isinstance(failure, ModelNotFound) and not {*one.models} & {*choice.named}:
        why += " (chosen from the catalogue; --model checks the one that you use)"
    return why


def _problems(
    choice: ModelSelection, routers: Mapping[str, Router], found: Checkup
) -> Iterator[str]:
    for one in found.results:
        if one.ok is False:
            yield f"{one.models[0]} at {one}: {one.why}"
    for name in choice.named if choice.must_work else ():
        why = {one.why for one in found.results if name in one.models}
        if not routers[name].routes and CLIENTS_PAY not in why:
            yield local.MISSING if local.MISSING in why else routers[name].unavailable
    for pair in found.comparisons:
        if not pair.ok:
            yield (
                f"{pair.one.space.name}: {pair.one} and {pair.other} are refused as one space: the"
                f" least cosine of their vectors is {pair.cosine:.6f}, below {SAME}. They are two"
                " spaces: remove one of the routes, or give it a model with a space of its own"
            )


def provider_problems(
    configuration: Configuration, statuses: Mapping[str, ProviderStatus]
) -> Iterator[str]:
    """Yield a problem for each provider that the file names in vain, and for want of any.

    With `cache.mode: frozen` no provider is asked, so none has to be usable.
    """
    settings = configuration.settings
    if settings.cache.mode == "frozen":
        return
    usable = {name for name, one in statuses.items() if _can_answer(one)}
    leading = {
        route.provider for model in settings.models.values() for route in model.routes
    } & usable
    in_vain = list(_unreachable_providers(configuration, statuses, usable, leading))
    if in_vain:
        yield from in_vain
    elif not leading:
        yield (
            "no provider can be asked: every input that is not in the cache is answered with an"
            f" error{_reasons(statuses)}"
        )
    elif not _has_remote(settings, leading) and not _is_local_by_choice(configuration):
        yield (
            "no remote provider can be asked: every input that is not in the cache is answered"
            f" with an error, but for those of the local model{_reasons(statuses)}"
        )


def _unreachable_providers(
    configuration: Configuration,
    statuses: Mapping[str, ProviderStatus],
    usable: Collection[str],
    leading: Collection[str],
) -> Iterator[str]:
    """Yield a problem for each provider that the file names and no request can reach."""
    for name in configuration.providers:
        why = statuses[name].why
        if name not in usable:
            yield configuration.problem(("providers", name), f"this provider is skipped: {why}")
        elif name not in leading and configuration.settings.passthrough != name:
            yield configuration.problem(("providers", name), f"is never asked: {why}")


def _can_answer(status: ProviderStatus) -> bool:
    """Tell whether requests may be answered by a provider."""
    return status.state == "usable" or status.why == CLIENTS_PAY


def _has_remote(settings: Settings, names: Iterable[str]) -> bool:
    entries = (settings.providers[name] for name in names)
    return any(entry is not None and entry.kind != registry.LOCAL for entry in entries)


def _is_local_by_choice(configuration: Configuration) -> bool:
    """Tell whether the file names providers, and no remote one among them."""
    is_chosen = configuration.file is not None and configuration.settings.names_providers
    return is_chosen and not _has_remote(configuration.settings, configuration.providers)


def _reasons(statuses: Mapping[str, ProviderStatus]) -> str:
    """Return why providers cannot be asked, with the remedies."""
    skipped = [f"{name}: {one.why}" for name, one in statuses.items() if one.state == "skipped"]
    return f" ({'; '.join(skipped)})" if skipped else "; add a provider to `providers`"


@dataclass(frozen=True, slots=True)
class CollectionStatus:
    """What came of asking the Qdrant of a configuration."""

    place: str
    """Its address, or its folder."""
    ok: bool | None = None
    """Whether vectors may be written there; None if it was not asked."""
    collections: int | None = None
    error: str | None = None
    note: str | None = None
    """What works, but only in part."""

    @property
    def line(self) -> str:
        """What is to be told, in one line."""
        if self.ok:
            note = f"; {self.note}" if self.note else ""
            return f"Qdrant: {self.place}: ok, {self.collections} collections{note}"
        return f"Qdrant: {self.place}: {'FAILED' if self.ok is False else self.error}"

    @property
    def problem(self) -> str | None:
        """What is wrong, if something is."""
        return f"index.qdrant: {self.error}" if self.ok is False else None

    def as_json(self) -> dict[str, object]:
        """Return everything there is to say."""
        return asdict(self)


async def check_qdrant(  # noqa: PLR0911 - one for each thing that may come of it
    settings: Settings, *, offline: bool
) -> CollectionStatus | None:
    """Open the Qdrant of a configuration, and prove that it takes points; None if it has none.

    Sees whose collections are there first. For the proof a collection of its own is made, and
    removed again.
    """
    qdrant = settings.index.qdrant
    if qdrant is None:
        return None
    place = qdrant.url or str(qdrant.path)
    if offline:
        return CollectionStatus(place, error="not asked")
    if qdrant.path is not None and not qdrant.path.exists():
        return CollectionStatus(place, error="not there yet, the proxy makes it at its first start")
    try:
        async with (
            asyncio.timeout(QDRANT_TIMEOUT_S),
            index_writes.connection(qdrant) as opened,
        ):
            found = await opened.ask(lambda client: client.get_collections())
            against = await index_writes.find_conflicts(settings, opened)
            names = [one.name for one in found.collections]
            note = None if against else await _prove_writes(settings, qdrant, opened, names)
    except InUse as error:
        # Most likely by a proxy that runs; it has looked at its start.
        return CollectionStatus(place, error=str(error))
    except QdrantFailure as error:
        return CollectionStatus(place, ok=False, error=str(error))
    except TimeoutError:
        return CollectionStatus(place, ok=False, error=f"no answer within {QDRANT_TIMEOUT_S:.0f} s")
    if against:
        return CollectionStatus(place, ok=False, error="; ".join(against))
    return CollectionStatus(place, ok=True, collections=len(names), note=note)


async def _prove_writes(
    settings: Settings, qdrant: Qdrant, opened: Connection, names: Sequence[str]
) -> str | None:
    """Write a point to a collection that is made for it, and remove both.

    Returns what a key lacks with which some collections can be written to. Raises QdrantFailure;
    Denied for a key with which none can.
    """
    name = f"{qdrant.prefix}embedding-proxy-check-{uuid4().hex[:8]}"
    options = index_writes.collection_options(qdrant)
    point = QueuedPoint(0, uuid4().bytes, vector.from_numbers([1.0, 0.0]), b"{}", 0, b"", False)  # noqa: FBT003
    try:
        await ensure(opened, name, Provenance("embedding-proxy/check", 2), options)
        try:
            await upsert(opened, name, [point], options.vector_name)
        finally:
            await opened.ask(lambda client: client.delete_collection(name))
    except Denied as denied:
        return await _writable_collections(settings, qdrant, opened, names, denied)
    return None


async def _writable_collections(
    settings: Settings, qdrant: Qdrant, opened: Connection, names: Sequence[str], denied: Denied
) -> str:
    """Return in words which collections a key can write to that can make none.

    Raises Denied if there are none, or if one of the models' own is none of them.
    """
    own = index_writes.collection_names(settings, qdrant)
    ours = [one for one in names if one == qdrant.collection or own.is_own(one)]
    writable, refused = [], []
    for name in ours or names:
        nothing = [str(uuid4())]
        try:
            # What is not there is deleted without effect, and needs the same right as a write.
            await opened.ask(
                lambda client, name=name, ids=nothing: client.delete(name, ids, wait=True)  # type: ignore[misc]
            )
            writable.append(name)
        except Denied as error:
            refused.append(f"{name}: {error}")
    if ours and refused:
        raise Denied(f"points cannot be written to {refused[0]}")
    if not writable or (qdrant.collection and not ours):
        lack = qdrant.collection or "the collections of the models"
        raise Denied(f"{lack} cannot be made, and no collection there can be written to: {denied}")
    return f"the key makes no collections, it can write to {', '.join(writable)} alone"


@dataclass(frozen=True, slots=True)
class SharedStatus:
    """What came of asking the servers of `cache.shared`."""

    address: str
    ok: bool | None = None
    """Whether records can be written and read; None if it was not asked."""
    error: str | None = None
    note: str | None = None
    """What works, but not as it should."""

    @property
    def line(self) -> str:
        """What is to be told, in one line."""
        state = "not asked" if self.ok is None else "ok" if self.ok else "FAILED"
        return f"shared tier: {self.address}: {state}{f'; {self.note}' if self.note else ''}"

    @property
    def problem(self) -> str | None:
        """What is wrong, if something is."""
        return f"cache.shared: {self.error}" if self.ok is False else None

    def as_json(self) -> dict[str, object]:
        """Return everything there is to say."""
        return asdict(self)


async def check_shared(settings: Settings, *, offline: bool) -> SharedStatus | None:
    """Write a record to the shared tier of a configuration, read and delete it; None without one.

    Raises ConfigError for what `serve` would not start with.
    """
    tier = shared_tier(settings, SHARED_LIMIT_S)
    if tier is None or settings.cache.shared is None:
        return None
    if offline:
        return SharedStatus(tier.redis.name)
    async with tier.redis as redis:
        if not redis.is_available:
            return SharedStatus(redis.name, ok=False, error=redis.reason)
        failure = await tier.prove_writes()
        if failure.startswith("MOVED "):
            failure = f"it is a server of a cluster: write redis+cluster://… ({failure})"
        if failure:
            return SharedStatus(redis.name, ok=False, error=failure)
        mean_ms = 1000 * redis.counters.seconds / redis.counters.exchanges
        policy = await tier.eviction_policy()
    notes = []
    limit_ms = settings.cache.shared.timeout_ms
    if mean_ms > limit_ms:
        notes.append(
            f"an exchange takes {mean_ms:.1f} ms, and is given up after timeout_ms: {limit_ms:g}"
        )
    if policy is not None and not policy.startswith("allkeys-"):
        notes.append(
            f"its maxmemory-policy is {policy}: once it is full it takes no further records; set"
            " allkeys-lru"
        )
    return SharedStatus(redis.name, ok=True, note="; ".join(notes) or None)

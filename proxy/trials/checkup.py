"""Whether what a configuration names works, found out before the first request. Prints nothing.

Each route is asked for known texts; the routes of one space must then have given the same vectors.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from embedding_proxy.providers import local, tokens
from embedding_proxy.providers.base import (
    AuthenticationError,
    Context,
    EmbeddingError,
    ModelNotFound,
)
from embedding_proxy.providers.probe import SAME, TEXTS, probe
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.proxy.embedding.opening import CLIENTS_PAY
from embedding_proxy.proxy.settings.schema import Settings

from .candidates import ProviderStatus, find
from .choice import ModelSelection, with_stand_ins
from .finding import Comparison, RouteResult, compare

AT_ONCE = 8
"""Providers that are asked at the same time, each for one model after the other: so the times are
those of single calls, and a small machine need not load several models at once."""


@dataclass(slots=True)
class Checkup:
    """What was found."""

    providers: Mapping[str, ProviderStatus]
    findings: list[RouteResult]
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line for each thing that does not work."""


async def examine(
    settings: Settings, choice: ModelSelection, *, offline: bool, tell: Callable[[float], None]
) -> Checkup:
    """Ask every usable route of the chosen models, unless `offline`. Raises ConfigError.

    `tell` is told how many routes have been asked.
    """
    choice = replace(choice, named=with_stand_ins(settings, choice.named))
    async with AsyncExitStack() as stack:
        candidates = await find(settings, choice, stack)
        found = Checkup(candidates.standings, candidates.findings)
        if not offline:
            await _ask(found.findings, settings.server.request_timeout_s, tell)
    for one in found.findings:
        if one.probe is not None:
            failure = one.probe.failure
            one.why = "" if failure is None else _why(settings, choice, one, failure)
    found.comparisons = list(compare(found.findings))
    found.problems = list(_problems(choice, candidates.routers, found))
    return found


async def _ask(
    findings: Sequence[RouteResult], patience_s: float, tell: Callable[[float], None]
) -> None:
    clock = asyncio.get_running_loop().time
    gate = asyncio.Semaphore(AT_ONCE)
    queues: defaultdict[str, list[tuple[RouteResult, Route]]] = defaultdict(list)
    for one in findings:
        if one.route is not None:
            queues[one.provider].append((one, one.route))
    for encoding in {one.space.tokenizer for one in findings if one.space.tokenizer}:
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


def _why(
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
    for one in found.findings:
        if one.ok is False:
            yield f"{one.models[0]} at {one}: {one.why}"
    for name in choice.named if choice.must_work else ():
        why = {one.why for one in found.findings if name in one.models}
        if not routers[name].routes and CLIENTS_PAY not in why:
            yield local.MISSING if local.MISSING in why else routers[name].unavailable
    for pair in found.comparisons:
        if not pair.ok:
            yield (
                f"{pair.one.space.name}: {pair.one} and {pair.other} are refused as one space: the"
                f" least cosine of their vectors is {pair.cosine:.6f}, below {SAME}. They are two"
                " spaces: remove one of the routes, or give it a model with a space of its own"
            )

"""Whether what a configuration names works, found out before the first request. Prints nothing.

Each route is asked for known texts; the routes of one space must then have given the same vectors.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

from cache import disk
from providers import kinds, local, tokens
from providers.base import (
    Context,
    CredentialsRefused,
    EmbeddingError,
    InvalidAnswer,
    ModelNotFound,
    ProviderError,
    Space,
)
from providers.health import Upstreams
from providers.probe import SAME, TEXTS, Probe, probe
from providers.route import Route
from providers.router import Router

from .choice import Choice, choose, with_stand_ins
from .finding import Comparison, Finding, compare
from .learned import WIDTHS_FILE, Pins
from .model_entry import Model
from .opening import make_router, open_providers
from .settings import Settings

AT_ONCE = 8
"""Providers that are asked at the same time, each for one model after the other: so the times are
those of single calls, and a small machine need not load several models at once."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether a provider that the configuration names can be used."""

    state: Literal["usable", "skipped", "disabled"]
    kind: str | None
    why: str = ""
    """Why it cannot, or is of no use."""


@dataclass(slots=True)
class Checkup:
    """What was found."""

    providers: Mapping[str, Standing]
    findings: list[Finding]
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line for each thing that does not work."""


async def examine(
    settings: Settings, choice: Choice, *, offline: bool, tell: Callable[[float], None]
) -> Checkup:
    """Ask every usable route of the chosen models, unless `offline`. Raises ConfigError.

    `tell` is told how many routes have been asked.
    """
    choice = replace(choice, named=with_stand_ins(settings, choice.named))
    async with AsyncExitStack() as stack:
        opened = await open_providers(settings, stack)
        standings = {name: _standing(settings, name, opened) for name in settings.providers}
        usable = {name: one for name, one in opened.items() if standings[name].state == "usable"}
        models = choose(settings, choice, usable)
        upstreams = Upstreams()
        routers = {
            name: make_router(settings, name, model, usable, upstreams)
            for name, model in models.items()
        }
        pins = Pins(disk.folder_of(settings.cache.directory) / WIDTHS_FILE)
        found = Checkup(standings, _findings(models, routers, standings, pins))
        if not offline:
            await _ask(found.findings, settings.server.request_timeout_s, tell)
    for one in found.findings:
        if one.probe is not None:
            failure = one.probe.failure
            one.why = "" if failure is None else _why(settings, choice, one, failure)
    found.comparisons = list(compare(found.findings))
    found.problems = list(_problems(choice, routers, found))
    return found


def _standing(settings: Settings, name: str, opened: Collection[str]) -> Standing:
    entry = settings.providers[name]
    if entry is None:
        return Standing("disabled", None, "null in the configuration")
    if name not in opened:
        return Standing("skipped", entry.kind, f"{entry.key_variable} is not set")
    if entry.kind == kinds.LOCAL and not local.is_installed():
        return Standing("skipped", entry.kind, local.MISSING)
    if not any(route.provider == name for one in settings.models.values() for route in one.routes):
        return Standing("usable", entry.kind, "no model has a route to it; add one to `models`")
    return Standing("usable", entry.kind)


def _findings(
    models: Mapping[str, Model],
    routers: Mapping[str, Router],
    standings: Mapping[str, Standing],
    pins: Pins,
) -> list[Finding]:
    """Return the routes of some models, those of one space together, each route once."""
    spaces = {}
    for name, model in models.items():
        space = model.as_space()
        # A width that the proxy has learned holds from then on.
        spaces[name] = replace(space, dimensions=space.dimensions or pins.width(space.name))
    order = list(dict.fromkeys(space.name for space in spaces.values()))
    found: dict[tuple[Space, str, str], Finding] = {}
    for name in sorted(routers, key=lambda name: order.index(spaces[name].name)):
        routes = {(route.name, route.model): route for route in routers[name].routes}
        for entry in models[name].routes:
            here = (entry.provider, entry.model)
            one = found.setdefault(
                (spaces[name], *here), Finding([], spaces[name], *here, routes.get(here))
            )
            if name not in one.models:
                one.models.append(name)
            if one.route is None:
                standing = standings.get(entry.provider)
                one.why = standing.why if standing else "the provider is not configured"
    return list(found.values())


async def _ask(
    findings: Sequence[Finding], patience_s: float, tell: Callable[[float], None]
) -> None:
    clock = asyncio.get_running_loop().time
    gate = asyncio.Semaphore(AT_ONCE)
    queues: defaultdict[str, list[tuple[Finding, Route]]] = defaultdict(list)
    for one in findings:
        if one.route is not None:
            queues[one.provider].append((one, one.route))
    for encoding in {one.space.tokenizer for one in findings if one.space.tokenizer}:
        # To load a vocabulary takes 0.1 s, which are no provider's.
        tokens.count(TEXTS, encoding)
    done = 0

    async def ask_in_turn(queue: Sequence[tuple[Finding, Route]]) -> None:
        nonlocal done
        async with gate:
            for one, route in queue:
                one.probe = await _probe(route, one.space, clock() + patience_s, clock)
                done += 1
                tell(done)

    async with asyncio.TaskGroup() as group:
        for queue in queues.values():
            group.create_task(ask_in_turn(queue))


async def _probe(route: Route, space: Space, deadline: float, clock: Callable[[], float]) -> Probe:
    begun = clock()
    try:
        found = await probe(route, space, Context(deadline), clock)
    except Exception as error:  # noqa: BLE001 - of a kind that somebody's package brings
        problem = f"its own code failed: {type(error).__name__}"
        return Probe(route, clock() - begun, failure=ProviderError(route.name, problem))
    if len({len(vector) for vector in found.vectors}) > 1:
        # Where a width is not known yet, nobody has compared it so far.
        failure = InvalidAnswer(route.name, "its vectors are not of one width")
        return replace(found, vectors=(), failure=failure)
    return found


def _why(settings: Settings, choice: Choice, one: Finding, failure: EmbeddingError) -> str:
    """Say why a route failed, and what may be done."""
    why = str(failure).removeprefix(f"{one.provider}: ")
    entry = settings.providers[one.provider]
    if isinstance(failure, CredentialsRefused) and entry and entry.key_variable:
        why += f" (its key is that in {entry.key_variable})"
    if isinstance(failure, ModelNotFound) and not {*one.models} & {*choice.named}:
        why += " (chosen from the catalogue; --model checks the one that you use)"
    return why


def _problems(choice: Choice, routers: Mapping[str, Router], found: Checkup) -> Iterator[str]:
    for one in found.findings:
        if one.ok is False:
            yield f"{one.models[0]} at {one}: {one.why}"
    for name in choice.named if choice.must_work else ():
        if not routers[name].routes:
            missing = any(one.why == local.MISSING for one in found.findings if name in one.models)
            yield local.MISSING if missing else routers[name].unavailable
    for pair in found.comparisons:
        if not pair.ok:
            yield (
                f"{pair.one.space.name}: {pair.one} and {pair.other} are refused as one space: the"
                f" least cosine of their vectors is {pair.cosine:.6f}, below {SAME}. They are two"
                " spaces: remove one of the routes, or give it a model with a space of its own"
            )

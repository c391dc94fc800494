"""Whether what a configuration names works, found out before the first request. Prints nothing.

Each route is asked for known texts; the routes of one space must then have given the same vectors.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Literal

from providers import kinds, local, tokens
from providers.base import (
    Context,
    CredentialsRefused,
    EmbeddingError,
    ModelNotFound,
    ProviderError,
    Space,
)
from providers.health import Upstreams
from providers.probe import SAME, TEXTS, Probe, agreement, probe
from providers.route import Route
from providers.router import Router

from .choice import Choice, choose
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
class Finding:
    """A route in one space, the models that lead to it, and what came of asking it."""

    models: list[str]
    space: Space
    provider: str
    upstream_model: str
    route: Route | None
    """None where the provider cannot be used."""
    why: str = "not asked"
    """Why it was not asked, or failed; empty once it answered."""
    probe: Probe | None = None

    @property
    def ok(self) -> bool | None:
        """Whether it answered well; None if it was not asked."""
        return None if self.probe is None else self.probe.failure is None

    def __str__(self) -> str:
        return f"{self.provider} ({self.upstream_model})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two routes of one space that answered, and the least cosine between their answers."""

    one: Finding
    other: Finding
    cosine: float

    @property
    def ok(self) -> bool:
        """Whether they are one model."""
        return self.cosine >= SAME


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
    async with AsyncExitStack() as stack:
        opened = await open_providers(settings, stack)
        standings = {name: _standing(settings, name, opened) for name in settings.providers}
        usable = {name: one for name, one in opened.items() if standings[name].state == "usable"}
        upstreams = Upstreams()
        routers = {
            name: make_router(settings, name, usable, upstreams, asyncio.sleep)
            for name in choose(settings, choice, usable)
        }
        found = Checkup(standings, _findings(settings, routers, standings))
        if not offline:
            await _ask(found.findings, settings.server.request_timeout_s, tell)
    for one in found.findings:
        if one.probe is not None:
            failure = one.probe.failure
            one.why = "" if failure is None else _why(settings, choice, one, failure)
    found.comparisons = list(compare(found.findings))
    found.problems = list(_problems(choice, routers, found))
    return found


def compare(findings: Sequence[Finding]) -> Iterator[Comparison]:
    """Compare the answers of each space with the first of them; they are one model, or two."""
    answered: defaultdict[str, list[tuple[Finding, Probe]]] = defaultdict(list)
    for one in findings:
        if one.probe is not None and one.ok:
            answered[one.space.name].append((one, one.probe))
    for (first, base), *others in answered.values():
        for other, found in others:
            yield Comparison(first, other, agreement(base.vectors, found.vectors))


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
    settings: Settings, routers: Mapping[str, Router], standings: Mapping[str, Standing]
) -> list[Finding]:
    """Return the routes of some models, those of one space together, each route once."""
    spaces = {name: settings.models[name].as_space() for name in routers}
    order = list(dict.fromkeys(space.name for space in spaces.values()))
    found: dict[tuple[Space, str, str], Finding] = {}
    for name in sorted(routers, key=lambda name: order.index(spaces[name].name)):
        routes = {(route.name, route.model): route for route in routers[name].routes}
        for entry in settings.models[name].routes:
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
        return await probe(route, space, Context(deadline), clock)
    except Exception as error:  # noqa: BLE001 - of a kind that somebody's package brings
        problem = f"its own code failed: {type(error).__name__}"
        return Probe(route, clock() - begun, failure=ProviderError(route.name, problem))


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

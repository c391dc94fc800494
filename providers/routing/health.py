"""What is known of the providers, shared by the routers of all models: breakers, proofs, counters.

A breaker is a provider's, for what is down is down for every model. Rate limits are a model's: one
that says when it wants to be asked again rests, and the provider's other models are asked on. After
a rest calls go through as before: that the provider answers was never in doubt.

The numbers here are read by whoever shows them; `snapshot` gives them as plain values.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import TypedDict

from providers.base import ProviderError, RateLimited

from . import faults
from .breaker import Breaker, Permit, State, Verdict
from .budget import Budget

log = logging.getLogger("embedding_proxy.health")

PROOF = 10.0
"""Seconds for which a good answer proves a provider well."""
LONGEST_REST = 3600.0
"""Seconds; who names next year is asked again within the hour."""
PROBE_REST = 1.0
"""Seconds of rest after a probe that met a rate limit without a time: it proved nothing."""
DECLINED = 1.0
"""Seconds for which one refusal that does not count speaks for all who would go on."""


class Snapshot(TypedDict):
    """A provider's state, for people and metrics."""

    state: State
    until_s: float
    """Seconds until it may be asked again."""
    rests: dict[str, float]
    """Seconds for which it may not be asked for a model, by its own name for it."""
    why: str
    failures_in_a_row: int
    opened: int
    attempts: int
    failures: dict[str, int]
    """By class of the error."""


class Health:
    """What is known of one provider."""

    def __init__(self, name: str, clock: Callable[[], float], chance: Callable[[], float]) -> None:
        self.name = name
        self.breaker = Breaker(clock, chance)
        self.attempts = 0
        self.failures: Counter[str] = Counter()
        self.scouts = 0
        """Calls under way of requests that went on to this provider without a proof."""
        self._clock = clock
        self._proof: float | None = None
        self._declined: dict[str, float] = {}
        self._rests: dict[str, float] = {}
        """Until when a model rests, by the provider's name for it."""
        self._news = asyncio.Event()

    @property
    def proved(self) -> bool:
        """Whether it answered well a moment ago, and has not failed since."""
        return self._proof is not None and self._clock() - self._proof <= PROOF

    def declined(self, model: str) -> bool:
        """Tell whether it has just refused a model in a way that says nothing of the service."""
        return self._clock() - self._declined.get(model, float("-inf")) < DECLINED

    def rest(self, model: str) -> float:
        """Return the seconds for which it still wants no call for a model, whatever its breaker."""
        return max(self._rests.get(model, 0.0) - self._clock(), 0.0)

    def wait(self, model: str) -> float:
        """Return the seconds until it may be asked for a model; 0 when it may now."""
        return max(self.rest(model), self.breaker.wait)

    def why(self, model: str) -> str:
        """Say why it may not be asked for a model: what holds it back the longest."""
        return "rate limited" if self.rest(model) > self.breaker.wait else self.breaker.why

    def ready(self, model: str, *, rested: bool = False) -> bool:
        """Tell whether `enter` would give a permit. `rested`: the caller has done its own rest."""
        return (rested or not self.rest(model)) and self.breaker.ready()

    async def news(self) -> None:
        """Wait until the next call of this provider ends, in whatever way."""
        await self._news.wait()

    def enter(self, model: str, *, rested: bool = False) -> Permit | None:
        """Return the permit for one call, and count it; None when none may be made now."""
        permit = self.breaker.enter() if self.ready(model, rested=rested) else None
        if permit is not None:
            self.attempts += 1
        return permit

    def answered(self, permit: Permit) -> None:
        """Note a good answer."""
        if permit.probe:
            log.warning("%s: is well again", self.name)
        self._proof = self._clock()
        self._leave(permit, Verdict.GOOD)

    def failed(self, permit: Permit, error: ProviderError, model: str) -> None:
        """Note a failure; afterwards the breaker may be open, or the model rest."""
        self.failures[type(error).__name__] += 1
        rule = faults.rule(error)
        opened = self.breaker.opened
        if rule.verdict is Verdict.BAD:
            self._proof = None
        elif rule.verdict is Verdict.NONE:
            self._declined[model] = self._clock()
        if rule.trips is not None:
            self.breaker.trip(permit, rule.trips, rule.why)
        elif isinstance(error, RateLimited):
            wait = error.retry_after
            if wait is None:
                wait = PROBE_REST if permit.probe else 0.0
            until = self._clock() + min(wait, LONGEST_REST)
            self._rests[model] = max(self._rests.get(model, until), until)
        self._leave(permit, rule.verdict)
        if self.breaker.opened > opened:
            log.warning(
                "%s: not asked for %.1f s: %s", self.name, self.breaker.wait, self.breaker.why
            )

    def abandoned(self, permit: Permit) -> None:
        """Note a call that ended without saying anything about the provider."""
        self._leave(permit, Verdict.NONE)

    def unsent(self, permit: Permit) -> None:
        """Take back a call that was not made after all."""
        self.attempts -= 1
        self._leave(permit, Verdict.NONE)

    def _leave(self, permit: Permit, verdict: Verdict) -> None:
        self.breaker.leave(permit, verdict)
        self._news.set()
        self._news = asyncio.Event()

    def snapshot(self) -> Snapshot:
        """Return the present state."""
        held = self.breaker.state is not State.CLOSED
        return Snapshot(
            state=self.breaker.state,
            until_s=round(self.breaker.wait, 3),
            rests={m: round(left, 3) for m in self._rests if (left := self.rest(m))},
            why=self.breaker.why if held else "",
            failures_in_a_row=self.breaker.in_a_row,
            opened=self.breaker.opened,
            attempts=self.attempts,
            failures=dict(self.failures),
        )


class Upstreams:
    """All providers, by name, and the budget they share.

    `clock` gives seconds and is the event loop's by default, as deadlines are; `chance` gives
    numbers in [0, 1).
    """

    def __init__(
        self,
        clock: Callable[[], float] = lambda: asyncio.get_running_loop().time(),
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.clock = clock
        self.budget = Budget(clock)
        self._chance = chance
        self._healths: dict[str, Health] = {}

    def of(self, name: str) -> Health:
        """Return what is known of a provider."""
        health = self._healths.get(name)
        if health is None:
            health = self._healths[name] = Health(name, self.clock, self._chance)
        return health

    def snapshot(self) -> dict[str, Snapshot]:
        """Return the state of every provider that has been asked for, by name."""
        return {name: health.snapshot() for name, health in self._healths.items()}

"""What is known of the providers, shared by the routers of all models: breakers, proofs, counters.

A breaker is a provider's, for what is down is down for every model. Rate limits are a lane's: a
model's, or, at a provider that is asked with clients' own keys, a key's for a model. A lane that
says when it wants to be asked again rests, and the provider's others are asked on. After a rest
calls go through as before: that the provider answers was never in doubt.

The numbers here are read by whoever shows them; `snapshot` gives them as plain values.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import TypedDict

from providers.base import Credential, ProviderError, RateLimited
from providers.credential import ByKey

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


MOST_LANES = 2000
"""Lanes of a provider of which something is remembered; half of them go when there are more."""


def _bounded(lanes: dict[str, float]) -> dict[str, float]:
    """Return the same lanes, without those noted longest ago if there are too many."""
    if len(lanes) >= MOST_LANES:
        for lane in list(lanes)[: MOST_LANES // 2]:
            del lanes[lane]
    return lanes


class Snapshot(TypedDict):
    """A provider's state, for people and metrics."""

    state: State
    until_s: float
    """Seconds until it may be asked again."""
    rests: dict[str, float]
    """Seconds for which it may not be asked in a lane: a model by its own name for it."""
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
        """Until when a lane rests."""
        self._news = asyncio.Event()

    @property
    def proved(self) -> bool:
        """Whether it answered well a moment ago, and has not failed since."""
        return self._proof is not None and self._clock() - self._proof <= PROOF

    def declined(self, lane: str) -> bool:
        """Tell whether it has just refused a lane in a way that says nothing of the service."""
        return self._clock() - self._declined.get(lane, float("-inf")) < DECLINED

    def rest(self, lane: str) -> float:
        """Return the seconds for which it still wants no call in a lane, whatever its breaker."""
        return max(self._rests.get(lane, 0.0) - self._clock(), 0.0)

    def wait(self, lane: str) -> float:
        """Return the seconds until it may be asked in a lane; 0 when it may now."""
        return max(self.rest(lane), self.breaker.wait)

    def why(self, lane: str) -> str:
        """Say why it may not be asked in a lane: what holds it back the longest."""
        return "rate limited" if self.rest(lane) > self.breaker.wait else self.breaker.why

    def ready(self, lane: str, *, rested: bool = False) -> bool:
        """Tell whether `enter` would give a permit. `rested`: the caller has done its own rest."""
        return (rested or not self.rest(lane)) and self.breaker.ready()

    async def news(self) -> None:
        """Wait until the next call of this provider ends, in whatever way."""
        await self._news.wait()

    def enter(self, lane: str, *, rested: bool = False) -> Permit | None:
        """Return the permit for one call, and count it; None when none may be made now."""
        permit = self.breaker.enter() if self.ready(lane, rested=rested) else None
        if permit is not None:
            self.attempts += 1
        return permit

    def answered(self, permit: Permit) -> None:
        """Note a good answer."""
        if permit.probe:
            log.warning("%s: is well again", self.name)
        self._proof = self._clock()
        self._leave(permit, Verdict.GOOD)

    def failed(
        self, permit: Permit, error: ProviderError, lane: str, *, by_client: bool = False
    ) -> None:
        """Note a failure; afterwards the breaker may be open, or the lane rest.

        `by_client`: the key was a client's own, whose credit is nobody else's.
        """
        self.failures[type(error).__name__] += 1
        rule = faults.rule(error)
        opened = self.breaker.opened
        if rule.verdict is Verdict.BAD:
            self._proof = None
        elif rule.verdict is Verdict.NONE:
            _bounded(self._declined)[lane] = self._clock()
        if rule.trips is not None and not by_client:
            self.breaker.trip(permit, rule.trips, rule.why)
        elif isinstance(error, RateLimited):
            wait = error.retry_after
            if wait is None:
                wait = PROBE_REST if permit.probe else 0.0
            until = self._clock() + min(wait, LONGEST_REST)
            _bounded(self._rests)[lane] = max(self._rests.get(lane, until), until)
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
        self._budgets = ByKey(lambda: Budget(clock))
        self._chance = chance
        self._healths: dict[str, Health] = {}

    def budget_of(self, credential: Credential | None) -> Budget:
        """Return the budget of those who come with a key of their own, or that of all others."""
        return self.budget if credential is None else self._budgets.of(credential)

    def of(self, name: str) -> Health:
        """Return what is known of a provider."""
        health = self._healths.get(name)
        if health is None:
            health = self._healths[name] = Health(name, self.clock, self._chance)
        return health

    def snapshot(self) -> dict[str, Snapshot]:
        """Return the state of every provider that has been asked for, by name."""
        return {name: health.snapshot() for name, health in self._healths.items()}

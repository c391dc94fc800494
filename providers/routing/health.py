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
from collections.abc import Callable, Sequence
from typing import TypedDict, TypeVar
from weakref import WeakValueDictionary

from providers.attempts import Attempts
from providers.base import Credential, Input, ProviderError, RateLimited
from providers.credential import ByKey
from providers.scheduling.tasks import Tasks

from . import faults
from .breaker import Breaker, Permit, State, Verdict
from .budget import Budget

log = logging.getLogger("embedding_proxy.health")

T = TypeVar("T", int, float)

PROOF = 10.0
"""Seconds for which a good answer proves a provider well."""
LONGEST_REST = 3600.0
"""Seconds; who names next year is asked again within the hour."""
PROBE_REST = 1.0
"""Seconds of rest at least after a probe that met a rate limit: it proved nothing."""
FIRST_COOLDOWN = 0.2
MAX_COOLDOWN = 60.0
"""Seconds for which a lane is left alone after a rate limit that names no time: doubled each time
that the next call meets it again, up to the second."""
REPEAT_S = 60.0
"""Seconds within which a request for what has just failed is taken for a client's own retry."""
MAX_COUNTED = 20
"""Rate limits in a row that are counted: the cooldown has long reached its greatest length then."""
MAX_BLAMED = 1000
"""Inputs of which it is remembered that calls have failed with them."""
DECLINED = 1.0
"""Seconds for which one refusal that does not count speaks for all who would go on."""


MOST_LANES = 2000
"""Lanes of a provider of which something is remembered; half of them go when there are more."""


def _bounded(lanes: dict[str, T]) -> dict[str, T]:
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
        self._limited: dict[str, int] = {}
        """How often in a row a lane was rate limited, counting once for each rest."""
        self._blamed: dict[int, None] = {}
        self._failed: dict[int, float] = {}
        """When a request failed, by its first input."""
        self._lasting: ProviderError | None = None
        self._news = asyncio.Event()

    @property
    def proved(self) -> bool:
        """Whether it answered well a moment ago, and has not failed since."""
        return self._proof is not None and self._clock() - self._proof <= PROOF

    def declined(self, lane: str) -> bool:
        """Tell whether it has just refused a lane in a way that says nothing of the service."""
        return self._clock() - self._declined.get(lane, float("-inf")) < DECLINED

    def is_limited(self, lane: str) -> bool:
        """Tell whether the last call in a lane met a rate limit."""
        return lane in self._limited

    @property
    def lasting(self) -> ProviderError | None:
        """The refusal that keeps it from being asked, and that no second try mends; or None."""
        error = self._lasting
        if error is None or self.breaker.state is State.CLOSED:
            return None
        return error if self.breaker.why == faults.rule(error).why else None

    @property
    def has_blamed(self) -> bool:
        """Whether calls are known to fail because of any input."""
        return bool(self._blamed)

    def is_repeat(self, lane: str, item: Input) -> bool:
        """Tell whether a request that begins with this input has failed a moment ago."""
        failed_at = self._failed.get(hash((lane, item)))
        return failed_at is not None and self._clock() - failed_at <= REPEAT_S

    def note_failed(self, lane: str, item: Input) -> None:
        """Remember that a request that begins with this input has failed."""
        key = hash((lane, item))
        self._failed.pop(key, None)
        self._failed[key] = self._clock()
        if len(self._failed) > MAX_BLAMED:
            del self._failed[next(iter(self._failed))]

    def is_blamed(self, lane: str, item: Input) -> bool:
        """Tell whether calls are known to fail because of this input."""
        return hash((lane, item)) in self._blamed

    def blame_input(self, lane: str, item: Input) -> None:
        """Remember that a call failed because of this input, and not of the provider."""
        self._blamed[hash((lane, item))] = None
        if len(self._blamed) > MAX_BLAMED:
            del self._blamed[next(iter(self._blamed))]

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

    def answered(self, permit: Permit, lane: str, inputs: Sequence[Input]) -> None:
        """Note a good answer in a lane, to these inputs."""
        if self._blamed and len(inputs) == 1:
            # Calls failed because of it once; they do no more.
            self._blamed.pop(hash((lane, inputs[0])), None)
        if permit.probe:
            log.warning("%s: is well again", self.name)
        self._proof = self._clock()
        self._limited.pop(lane, None)
        self._leave(permit, Verdict.GOOD)

    def failed(
        self,
        permit: Permit,
        error: ProviderError,
        lane: str,
        *,
        by_client: bool = False,
        is_about_input: bool = False,
    ) -> None:
        """Note a failure; afterwards the breaker may be open, or the lane rest.

        `by_client`: the key was a client's own, whose credit is nobody else's. `is_about_input`: it
        may be due to one input alone, and does not count against the provider for now.
        """
        self.failures[type(error).__name__] += 1
        rule = faults.rule(error)
        opened = self.breaker.opened
        verdict = rule.verdict
        if is_about_input:
            verdict = Verdict.NONE
        elif verdict is Verdict.BAD:
            self._proof = None
        elif verdict is Verdict.NONE:
            _bounded(self._declined)[lane] = self._clock()
        if rule.trips is not None and not by_client:
            self._lasting = error
            self.breaker.trip(permit, rule.trips, rule.why)
        elif isinstance(error, RateLimited):
            self._cool_down(lane, error.retry_after, PROBE_REST if permit.probe else 0.0)
        self._leave(permit, verdict)
        if self.breaker.opened > opened:
            log.warning(
                "%s: not asked for %.1f s: %s", self.name, self.breaker.wait, self.breaker.why
            )

    def blame(self) -> None:
        """Count a failure against the provider that did not count at first."""
        opened = self.breaker.opened
        self._proof = None
        self.breaker.fail()
        if self.breaker.opened > opened:
            log.warning(
                "%s: not asked for %.1f s: %s", self.name, self.breaker.wait, self.breaker.why
            )

    def _cool_down(self, lane: str, wait: float | None, min_wait: float) -> None:
        """Leave a lane alone: for as long as it asked, else longer each time in a row."""
        if not self.rest(lane):
            # Calls that were under way together meet one limit once.
            self._limited[lane] = min(self._limited.get(lane, 0) + 1, MAX_COUNTED)
            _bounded(self._limited)
        if not wait:
            if self.rest(lane):
                return
            wait = min(FIRST_COOLDOWN * 2 ** (self._limited[lane] - 1), MAX_COOLDOWN)
            wait = max(wait, min_wait)
        until = self._clock() + min(wait, LONGEST_REST)
        _bounded(self._rests)[lane] = max(self._rests.get(lane, until), until)

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
        self.tasks = Tasks()
        """The workers that send batches, for requests that may be gone by now."""
        self.attempts = Attempts()
        """The attempts under way, which are finished though nobody may wait for them any more."""
        self.budget = Budget(clock)
        self._budgets = ByKey(lambda: Budget(clock))
        self._chance = chance
        self._healths: dict[str, Health] = {}
        self._slots: WeakValueDictionary[tuple[str, str], asyncio.Semaphore] = WeakValueDictionary()

    def budget_of(self, credential: Credential | None) -> Budget:
        """Return the budget of those who come with a key of their own, or that of all others."""
        return self.budget if credential is None else self._budgets.of(credential)

    def of(self, name: str) -> Health:
        """Return what is known of a provider."""
        health = self._healths.get(name)
        if health is None:
            health = self._healths[name] = Health(name, self.clock, self._chance)
        return health

    def slots(self, name: str, lane: str, number: int) -> asyncio.Semaphore:
        """Return so many slots for calls of a provider in one lane.

        A lane that waits for its rate limit keeps its own slots, and none of the others'. The
        provider sees to it that all lanes together make no more calls at a time than it takes.
        """
        slots = self._slots.get((name, lane))
        if slots is None:
            slots = self._slots[name, lane] = asyncio.Semaphore(number)
        return slots

    def snapshot(self) -> dict[str, Snapshot]:
        """Return the state of every provider that has been asked for, by name."""
        return {name: health.snapshot() for name, health in self._healths.items()}

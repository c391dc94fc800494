"""What is known of the providers, shared by the routers of all models: breakers, proofs, counters.

There are breakers of two sorts. That of the provider counts what is down for every model: failed
connections; and it opens where the provider refuses the proxy's key or has no credit for it. Each
scope (see `lane`) has a breaker of its own, which counts what may be due to the model or to fields
of the request: errors of the upstream, time-outs, bad answers. So a client that asks for a broken
model harms those alone who ask for the same.

Rate limits are a lane's: a model's, or, at a provider that is asked with clients' own keys, a key's
for a model. A lane that says when it wants to be asked again rests, and the provider's others are
asked on. After a rest calls go through as before: that the provider answers was never in doubt.

The numbers here are read by whoever shows them; `snapshot` gives them as plain values.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar
from weakref import WeakValueDictionary

from providers.attempts import Attempts
from providers.base import Credential, Input, ProviderError, RateLimited
from providers.credential import MOST_KEYS
from providers.lru_cache import LRUCache
from providers.scheduling.tasks import Tasks

from . import faults
from .breaker import Breaker, Permit, State, Verdict
from .budget import Budget
from .lane import scope_of

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


_SEVERITY = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}


def _bounded(lanes: dict[str, T]) -> dict[str, T]:
    """Return the same lanes, without those noted longest ago if there are too many."""
    if len(lanes) >= MOST_LANES:
        for lane in list(lanes)[: MOST_LANES // 2]:
            del lanes[lane]
    return lanes


@dataclass(frozen=True, eq=False, slots=True)
class Pass:
    """The right to make one call: a permit of the provider's breaker, and one of the scope's."""

    of_provider: Permit
    of_scope: Permit
    scope: str

    @property
    def probe(self) -> bool:
        """Whether the call decides if a breaker closes."""
        return self.of_provider.probe or self.of_scope.probe


class Snapshot(TypedDict):
    """A provider's state, for people and metrics."""

    state: State
    """The worst of its breakers."""
    until_s: float
    """Seconds until it may be asked again for what is held back the longest."""
    held: dict[str, float]
    """Seconds for which calls of one scope are held back: a model, with fields of requests."""
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
        """That of the provider as a whole."""
        self._chance = chance
        self._opened = 0
        self._breakers: dict[str, Breaker] = {}
        """Those of its scopes, the one that was asked longest ago first."""
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

    def breaker_of(self, lane: str) -> Breaker:
        """Return the breaker of a lane's scope."""
        scope = scope_of(lane)
        breaker = self._breakers.pop(scope, None) or Breaker(self._clock, self._chance)
        self._breakers[scope] = breaker
        if len(self._breakers) > MOST_LANES:
            self._forget_breakers()
        return breaker

    def _forget_breakers(self) -> None:
        """Forget half of the breakers: first those that count no failure, the oldest of them."""
        newest = reversed(self._breakers)
        ordered = sorted(newest, key=lambda scope: self._breakers[scope].is_clear)
        kept = {*ordered[: MOST_LANES // 2]}
        self._breakers = {scope: one for scope, one in self._breakers.items() if scope in kept}

    def held(self, lane: str) -> float:
        """Return the seconds for which a breaker holds a lane back; 0 when none does."""
        scope = self._breakers.get(scope_of(lane))
        return max(self.breaker.wait, 0.0 if scope is None else scope.wait)

    def wait(self, lane: str) -> float:
        """Return the seconds until it may be asked in a lane; 0 when it may now."""
        return max(self.rest(lane), self.held(lane))

    def why(self, lane: str) -> str:
        """Say why it may not be asked in a lane: what holds it back the longest."""
        if self.rest(lane) > self.held(lane):
            return "rate limited"
        scope = self._breakers.get(scope_of(lane))
        if scope is not None and scope.wait > self.breaker.wait:
            return scope.why
        return self.breaker.why

    def ready(self, lane: str, *, rested: bool = False) -> bool:
        """Tell whether `enter` would give a permit. `rested`: the caller has done its own rest."""
        if not rested and self.rest(lane):
            return False
        scope = self._breakers.get(scope_of(lane))
        return self.breaker.ready() and (scope is None or scope.ready())

    async def news(self) -> None:
        """Wait until the next call of this provider ends, in whatever way."""
        await self._news.wait()

    def enter(self, lane: str, *, rested: bool = False) -> Pass | None:
        """Return the permit for one call, and count it; None when none may be made now."""
        if not self.ready(lane, rested=rested):
            return None
        of_provider, of_scope = self.breaker.enter(), self.breaker_of(lane).enter()
        if of_provider is None or of_scope is None:
            raise RuntimeError(f"{self.name}: a breaker that is ready gives no permit")
        self.attempts += 1
        return Pass(of_provider, of_scope, scope_of(lane))

    def answered(self, permit: Pass, lane: str, inputs: Sequence[Input]) -> None:
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
        permit: Pass,
        error: ProviderError,
        lane: str,
        *,
        by_client: bool = False,
        is_uncounted: bool = False,
    ) -> None:
        """Note a failure; afterwards a breaker may be open, or the lane rest.

        `by_client`: the key was a client's own, whose credit is nobody else's. `is_uncounted`: it
        may be due to one input alone, or to a wait of our own, and counts against nobody for now.
        """
        self.failures[type(error).__name__] += 1
        rule = faults.rule(error)
        verdict = rule.verdict
        if is_uncounted:
            verdict = Verdict.NONE
        elif verdict is Verdict.BAD:
            self._proof = None
        elif verdict is Verdict.NONE and not rule.is_of_request:
            _bounded(self._declined)[lane] = self._clock()
        if rule.trips is not None and not by_client:
            self._lasting = error
            before = self.breaker.opened
            self.breaker.trip(permit.of_provider, rule.trips, rule.why)
            self._tell(self.breaker, before)
        elif isinstance(error, RateLimited):
            self._cool_down(lane, error.retry_after, PROBE_REST if permit.probe else 0.0)
        self._leave(permit, verdict, is_of_model=rule.is_of_model)

    def hung(self, permit: Pass) -> None:
        """Count a call that is under way as failed: its request's time was up while it waited.

        Its permit is given back; what comes of the call later is not counted again.
        """
        self._proof = None
        self._leave(permit, Verdict.BAD)

    def blame(self, lane: str) -> None:
        """Count a failure against the provider, in a scope, that did not count at first."""
        breaker = self.breaker_of(lane)
        before = breaker.opened
        self._proof = None
        breaker.fail()
        self._tell(breaker, before, scope_of(lane))

    def _tell(self, breaker: Breaker, opened: int, scope: str = "") -> None:
        """Say in the log that a breaker has opened, if it has since it had done so so often."""
        if breaker.opened > opened:
            self._opened += 1
            what = f" for {scope}" if scope else ""
            log.warning(
                "%s: not asked%s for %.1f s: %s", self.name, what, breaker.wait, breaker.why
            )

    def _cool_down(self, lane: str, wait: float | None, min_wait: float) -> None:
        """Leave a lane alone: for as long as it asked, else longer each time in a row."""
        # Looked at once: a rest may end between two looks.
        is_resting = self.rest(lane) > 0
        if not is_resting:
            # Calls that were under way together meet one limit once.
            self._limited[lane] = min(self._limited.get(lane, 0) + 1, MAX_COUNTED)
            _bounded(self._limited)
        if not wait:
            if is_resting:
                return
            wait = min(FIRST_COOLDOWN * 2 ** (self._limited[lane] - 1), MAX_COOLDOWN)
            wait = max(wait, min_wait)
        until = self._clock() + min(wait, LONGEST_REST)
        _bounded(self._rests)[lane] = max(self._rests.get(lane, until), until)

    def abandoned(self, permit: Pass) -> None:
        """Note a call that ended without saying anything about the provider."""
        self._leave(permit, Verdict.NONE)

    def unsent(self, permit: Pass) -> None:
        """Take back a call that was not made after all."""
        self.attempts -= 1
        self._leave(permit, Verdict.NONE)

    def _leave(self, permit: Pass, verdict: Verdict, *, is_of_model: bool = True) -> None:
        """Give back a permit. What is of the model says nothing of the provider, unless it is good.

        A provider that was probed and has answered, if only with an error, can be reached again.
        """
        is_good = verdict is Verdict.GOOD
        of_provider, of_scope = verdict, verdict
        if not is_good and is_of_model:
            is_reached = verdict is Verdict.BAD and permit.of_provider.probe
            of_provider = Verdict.GOOD if is_reached else Verdict.NONE
        elif not is_good:
            of_scope = Verdict.NONE
        breaker = self._breakers.get(permit.scope)
        for one, part, told, scope in (
            (self.breaker, permit.of_provider, of_provider, ""),
            (breaker, permit.of_scope, of_scope, permit.scope),
        ):
            if one is not None:
                before = one.opened
                one.leave(part, told)
                self._tell(one, before, scope)
        self._news.set()
        self._news = asyncio.Event()

    def snapshot(self) -> Snapshot:
        """Return the present state."""
        breakers = [self.breaker, *self._breakers.values()]
        worst = max(breakers, key=lambda one: (_SEVERITY[one.state], one.wait))
        return Snapshot(
            state=worst.state,
            until_s=round(worst.wait, 3),
            held={
                scope: round(one.wait, 3)
                for scope, one in self._breakers.items()
                if one.state is not State.CLOSED
            },
            rests={m: round(left, 3) for m in self._rests if (left := self.rest(m))},
            why="" if worst.state is State.CLOSED else worst.why,
            failures_in_a_row=max(one.in_a_row for one in breakers),
            opened=self._opened,
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
        self._budgets = LRUCache[str, Budget](MOST_KEYS)
        self._chance = chance
        self._healths: dict[str, Health] = {}
        self._slots: WeakValueDictionary[tuple[str, str], asyncio.Semaphore] = WeakValueDictionary()

    def budget_of(self, credential: Credential | None) -> Budget:
        """Return the budget of those who come with a key of their own, or that of all others."""
        if credential is None:
            return self.budget
        return self._budgets.get_or_make(credential.name, lambda: Budget(self.clock))

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

"""What is known of the providers, shared by all models: circuit breakers, cooldowns, counters.

A provider has a circuit breaker that counts what is down for every model: failed connections; and
it opens where the provider refuses the proxy's key or has no credit for it. Each scope (a model,
with the fields that clients add to their requests) has a breaker of its own, which counts errors of
the upstream, time-outs and bad answers. So a client that asks for a broken model harms those alone
who ask for the same.

A cooldown follows a rate limit. It is of a model, or, at a provider that is asked with clients' own
keys, of a key for a model. After it calls go through as before.

The numbers here are read by whoever shows them; `snapshot` gives them as plain values.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple, TypedDict
from weakref import WeakValueDictionary

from embedding_proxy.providers.attempts import Attempts
from embedding_proxy.providers.base import Input
from embedding_proxy.providers.client_credential import MOST_KEYS, Credential
from embedding_proxy.providers.errors import ProviderError, RateLimited
from embedding_proxy.providers.lru_cache import LRUCache
from embedding_proxy.providers.upstream.retry_after import PROBE_COOLDOWN_S, Cooldowns

from . import policy
from .circuit_breaker import CircuitBreaker, Permit, State, Verdict
from .retry_budget import RetryBudget
from .route import scope_of

log = logging.getLogger("embedding_proxy.health")

REPEAT_S = 60.0
"""Seconds within which a request for what has just failed is taken for a client's own retry."""
MAX_KEYS = 2000
"""Models and keys of a provider of which something is remembered."""
MAX_INPUTS = 1000
"""Inputs of which something is remembered."""

_SEVERITY = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}


class CallPermit(NamedTuple):
    """The right to make one call: a permit of the provider's breaker, and one of the scope's."""

    of_provider: Permit
    of_scope: Permit
    scope: str

    @property
    def is_probe(self) -> bool:
        """Whether the call decides if a breaker closes."""
        return self.of_provider.is_probe or self.of_scope.is_probe


class Snapshot(TypedDict):
    """A provider's state, for people and metrics."""

    state: State
    """The worst of its breakers."""
    until_s: float
    """Seconds until it may be asked again for what is held back the longest."""
    held: dict[str, float]
    """Seconds for which calls of one scope are held back: a model, with fields of requests."""
    rests: dict[str, float]
    """Seconds of cooldown of a model, by the provider's name for it, or of a key for it."""
    why: str
    failures_in_a_row: int
    opened: int
    attempts: int
    failures: dict[str, int]
    """By the reason of the error."""


class Health:
    """What is known of one provider. Keys are those of `Route.limit_key`."""

    def __init__(self, name: str, clock: Callable[[], float], chance: Callable[[], float]) -> None:
        self.name = name
        self._clock = clock
        self._chance = chance
        self.breaker = CircuitBreaker(clock, chance)
        """That of the provider as a whole."""
        self._breakers = LRUCache[str, CircuitBreaker](MAX_KEYS)
        """Those of its scopes."""
        self._opened = 0
        self.attempts = 0
        """Calls that have ended, for those who waited. It never falls."""
        self.failures: Counter[str] = Counter()
        self.cooldowns = Cooldowns(MAX_KEYS, clock)
        self._blamed = LRUCache[int, bool](MAX_INPUTS)
        self._failed = LRUCache[int, float](MAX_INPUTS)
        """When a request failed, by its first input."""
        self._lasting: ProviderError | None = None

    @property
    def lasting(self) -> ProviderError | None:
        """The refusal that keeps it from being asked, and that no second try mends; or None."""
        error = self._lasting
        if error is None or self.breaker.state is State.CLOSED:
            return None
        return error if self.breaker.reason == policy.rule(error).reason else None

    def inherit(self, former: "Health") -> None:
        """Take over what holds calls back: breakers and cooldowns. What was counted stays there."""
        self.breaker, self._breakers = former.breaker, former._breakers  # noqa: SLF001 - its kind
        self.cooldowns, self._lasting = former.cooldowns, former._lasting  # noqa: SLF001

    # Inputs.

    def is_repeat(self, key: str, item: Input) -> bool:
        """Tell whether a request that begins with this input has failed a moment ago."""
        failed_at = self._failed.peek(hash((key, item))) if self._failed else None
        return failed_at is not None and self._clock() - failed_at <= REPEAT_S

    def note_failed(self, key: str, item: Input) -> None:
        """Remember that a request that begins with this input has failed."""
        self._failed[hash((key, item))] = self._clock()

    def is_blamed(self, key: str, item: Input) -> bool:
        """Tell whether calls are known to fail because of this input."""
        return bool(self._blamed) and self._blamed.peek(hash((key, item))) is not None

    def blame_input(self, key: str, item: Input) -> None:
        """Remember that a call failed because of this input, and not of the provider."""
        self._blamed[hash((key, item))] = True

    # Whether it may be asked.

    def breaker_of(self, key: str) -> CircuitBreaker:
        """Return the breaker of a key's scope."""
        scope = scope_of(key)
        breaker = self._breakers.get(scope)
        if breaker is None:
            if len(self._breakers) >= self._breakers.max_size:
                # First one that counts no failure: names without end close no open breaker.
                pairs = self._breakers.items()
                idle = (name for name, candidate in pairs if candidate.failures == 0)
                self._breakers.pop(next(idle, scope))
            breaker = self._breakers[scope] = CircuitBreaker(self._clock, self._chance)
        return breaker

    def rest(self, key: str) -> float:
        """Return the seconds of cooldown that are left."""
        return self.cooldowns.rest(key)

    def held(self, key: str) -> float:
        """Return the seconds for which a breaker holds calls back; 0 when none does."""
        scope = self._breakers.peek(scope_of(key))
        return max(self.breaker.wait_s, 0.0 if scope is None else scope.wait_s)

    def wait(self, key: str) -> float:
        """Return the seconds until it may be asked; 0 when it may now."""
        return max(self.rest(key), self.held(key))

    def why(self, key: str) -> str:
        """Say why it may not be asked: what holds it back the longest."""
        if self.rest(key) > self.held(key):
            return "rate limited"
        scope = self._breakers.peek(scope_of(key))
        if scope is not None and scope.wait_s > self.breaker.wait_s:
            return scope.reason
        return self.breaker.reason

    def is_limited(self, key: str) -> bool:
        """Tell whether the last call met a rate limit."""
        return self.cooldowns.is_limited(key)

    def ready(self, key: str, *, rested: bool = False) -> bool:
        """Tell whether `acquire` would give a permit. `rested`: the caller has waited as told."""
        if not rested and self.rest(key):
            return False
        scope = self._breakers.peek(scope_of(key))
        return self.breaker.is_ready and (scope is None or scope.is_ready)

    def acquire(self, key: str, *, rested: bool = False) -> CallPermit | None:
        """Return the permit for one call; None when none may be made now."""
        if not self.ready(key, rested=rested):
            return None
        of_provider, of_scope = self.breaker.acquire(), self.breaker_of(key).acquire()
        if of_provider is None or of_scope is None:
            raise RuntimeError(f"{self.name}: a breaker that is ready gives no permit")
        return CallPermit(of_provider, of_scope, scope_of(key))

    # How a call ended; each of these gives back its permit.

    def succeeded(self, permit: CallPermit, key: str) -> None:
        """Note a good answer."""
        if permit.is_probe:
            log.warning("%s: is well again", self.name)
        self.cooldowns.succeeded(key)
        self._release(permit, Verdict.SUCCESS)

    def answered_alone(self, key: str, item: Input) -> None:
        """Note that a call with this input alone was answered: it is to blame no more."""
        if self._blamed:
            self._blamed.pop(hash((key, item)))

    def failed(
        self,
        permit: CallPermit,
        error: ProviderError,
        key: str,
        *,
        by_client: bool = False,
        is_counted: bool = True,
    ) -> None:
        """Note a failure; afterwards a breaker may be open, or a cooldown begun.

        `by_client`: the key was a client's own, whose credit is nobody else's. `is_counted`: False
        where it may be due to one input, or to a wait of our own.
        """
        self.failures[error.reason] += 1
        rule = policy.rule(error)
        if rule.opens_s is not None and not by_client:
            self._lasting = error
            before = self.breaker.times_opened
            self.breaker.open(permit.of_provider, rule.opens_s, rule.reason)
            self._tell(self.breaker, before)
        elif isinstance(error, RateLimited):
            min_wait = PROBE_COOLDOWN_S if permit.is_probe else 0.0
            self.cooldowns.begin(key, error.retry_after, min_wait)
        verdict = rule.verdict if is_counted else Verdict.NONE
        self._release(permit, verdict, is_of_model=rule.is_of_model)

    def cancelled(self, permit: CallPermit) -> None:
        """Note a call that says nothing of the provider."""
        self._release(permit, Verdict.NONE)

    def hung(self, permit: CallPermit) -> None:
        """Count a call that is under way as failed: its request's time is up."""
        self._release(permit, Verdict.FAILURE)

    def blame(self, key: str) -> None:
        """Count a failure, in a scope, that was not counted when it came."""
        breaker = self.breaker_of(key)
        before = breaker.times_opened
        breaker.record_failure()
        self._tell(breaker, before, scope_of(key))

    def _release(self, permit: CallPermit, verdict: Verdict, *, is_of_model: bool = True) -> None:
        """Give back a permit. A failure of the model says nothing of the provider.

        A provider that was probed and has answered, if only with an error, can be reached again.
        """
        of_provider = of_scope = verdict
        if verdict is Verdict.FAILURE and is_of_model:
            is_reached = permit.of_provider.is_probe
            of_provider = Verdict.SUCCESS if is_reached else Verdict.NONE
        elif verdict is Verdict.FAILURE:
            of_scope = Verdict.NONE
        before = self.breaker.times_opened
        self.breaker.release(permit.of_provider, of_provider)
        self._tell(self.breaker, before)
        breaker = self._breakers.peek(permit.scope)
        if breaker is not None:
            before = breaker.times_opened
            breaker.release(permit.of_scope, of_scope)
            self._tell(breaker, before, permit.scope)

    def _tell(self, breaker: CircuitBreaker, before: int, scope: str = "") -> None:
        """Say in the log that a breaker has opened, if it has."""
        if breaker.times_opened > before:
            self._opened += 1
            what = f" for {scope}" if scope else ""
            log.warning(
                "%s: not asked%s for %.1f s: %s", self.name, what, breaker.wait_s, breaker.reason
            )

    def snapshot(self) -> Snapshot:
        """Return the present state."""
        breakers = [self.breaker, *(breaker for _, breaker in self._breakers.items())]
        worst = max(breakers, key=lambda breaker: (_SEVERITY[breaker.state], breaker.wait_s))
        return Snapshot(
            state=worst.state,
            until_s=round(worst.wait_s, 3),
            held={
                scope: round(breaker.wait_s, 3)
                for scope, breaker in self._breakers.items()
                if breaker.state is not State.CLOSED
            },
            rests=self.cooldowns.waits(),
            why="" if worst.state is State.CLOSED else worst.reason,
            failures_in_a_row=max(breaker.failures for breaker in breakers),
            opened=self._opened,
            attempts=self.attempts,
            failures=dict(self.failures),
        )


class Slots:
    """The calls that a provider takes at a time, of one model. Waiting is first come, first served.

    For one thread: the event loop's.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self.used = 0
        self._waiting: dict[Callable[[], None], None] = {}

    def acquire(self, wake: Callable[[], None], max_used: int | None = None) -> bool:
        """Take a slot if fewer than `max_used` are taken; else have `wake` called when one is free.

        `wake` is called once. It may be called though no slot is free any more.
        """
        if self.used < min(self._number, max_used or self._number):
            self.used += 1
            return True
        self._waiting[wake] = None
        return False

    def acquire_free(self, number: int, max_used: int) -> int:
        """Take up to so many slots of those that are free now; return how many."""
        taken = max(0, min(number, min(self._number, max_used) - self.used))
        self.used += taken
        return taken

    def forget(self, wake: Callable[[], None]) -> None:
        """Wake this one no more."""
        self._waiting.pop(wake, None)

    def release(self) -> None:
        """Give a slot back, and wake those who have waited longest, as long as one is free."""
        self.used -= 1
        for wake in [*self._waiting]:
            if self.used >= self._number:
                return
            if wake in self._waiting:
                del self._waiting[wake]
                wake()


class HealthRegistry:
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
        self.attempts = Attempts()
        """The calls under way, which are finished though nobody may wait for them any more."""
        self.budget = RetryBudget(clock)
        self._budgets = LRUCache[str, RetryBudget](MOST_KEYS)
        self._chance = chance
        self._healths: dict[str, Health] = {}
        self._slots: WeakValueDictionary[tuple[str, str], Slots] = WeakValueDictionary()

    def budget_of(self, credential: Credential | None) -> RetryBudget:
        """Return the budget of those who come with a key of their own, or that of all others."""
        if credential is None:
            return self.budget
        return self._budgets.get_or_make(credential.name, lambda: RetryBudget(self.clock))

    def of(self, name: str) -> Health:
        """Return what is known of a provider."""
        health = self._healths.get(name)
        if health is None:
            health = self._healths[name] = Health(name, self.clock, self._chance)
        return health

    def inherit(self, former: "HealthRegistry", names: Collection[str]) -> None:
        """Take over what holds back calls of these providers."""
        for name, health in former._healths.items():  # noqa: SLF001 - of its own kind
            if name in names and name not in self._healths:
                self.of(name).inherit(health)

    def slots(self, name: str, key: str, number: int) -> Slots:
        """Return so many slots for calls of a provider for one model, or one key.

        What waits for its rate limit keeps its own slots, and none of the others'. The provider
        sees to it that all together make no more calls at a time than it takes.
        """
        slots = self._slots.get((name, key))
        if slots is None:
            slots = self._slots[name, key] = Slots(number)
        return slots

    def snapshot(self) -> dict[str, Snapshot]:
        """Return the state of every provider that has been asked for, by name."""
        return {name: health.snapshot() for name, health in self._healths.items()}

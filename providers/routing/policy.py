"""The policy after a failed attempt: a retry, the next route, or giving up.

Pure: a failure and where its inputs stand go in, a step comes out. What the failure means for the
circuit breakers is a column of the same table. The only importer of tenacity.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from embedding_proxy.providers.errors import (
    AuthenticationError,
    ConnectionTimeout,
    EmbeddingError,
    InvalidAnswer,
    LocalQueueFull,
    LoopDetected,
    MalformedResponse,
    ModelNotFound,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    ScopedQuotaExceeded,
    TransientError,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from tenacity import RetryCallState, Retrying, wait_random_exponential

from .circuit_breaker import Verdict

MAX_ATTEMPTS = 3
"""Attempts for one input, all routes together, unless the routes say more."""
MAX_ATTEMPTS_BEFORE_FAILOVER = 2
"""Attempts at one route while another is left, unless the route says how many."""
MAX_WAIT_S = 20.0
"""An upstream that asks for a longer wait is left for the next route."""
MAX_WAIT_BEFORE_FAILOVER_S = 0.5
"""A rate limit without a time is waited out for so long where another route is left."""
CREDIT_COOLDOWN_S = 300.0
KEY_COOLDOWN_S = 30.0
"""Short, since a key is mended by hand, and whoever does it watches."""
UNLIMITED = 99

_backoff = wait_random_exponential(multiplier=0.2, max=4.0)
_retrying = Retrying()


@dataclass(frozen=True, slots=True)
class Rule:
    """What follows from a class of failures."""

    retries: int
    """How many more times the same provider is asked, at most."""
    verdict: Verdict
    """What it counts for in the circuit breaker."""
    opens_s: float | None = None
    """Seconds for which the provider's breaker opens at once."""
    reason: str = ""
    """Why it is open then, in a few words."""
    is_of_model: bool = True
    """Whether it concerns the model that was asked for, and not the provider as a whole."""


RULES: dict[type[ProviderError], Rule] = {
    RateLimited: Rule(UNLIMITED, Verdict.NONE),
    QuotaExceeded: Rule(0, Verdict.NONE, CREDIT_COOLDOWN_S, "out of credit", is_of_model=False),
    ScopedQuotaExceeded: Rule(0, Verdict.NONE),
    AuthenticationError: Rule(0, Verdict.NONE, KEY_COOLDOWN_S, "key refused", is_of_model=False),
    PermissionDenied: Rule(0, Verdict.NONE),
    ModelNotFound: Rule(0, Verdict.NONE),
    LoopDetected: Rule(0, Verdict.NONE),
    UpstreamError: Rule(UNLIMITED, Verdict.FAILURE),
    UpstreamTimeout: Rule(0, Verdict.FAILURE),
    ConnectionTimeout: Rule(0, Verdict.FAILURE, is_of_model=False),
    Unreachable: Rule(1, Verdict.FAILURE, is_of_model=False),
    MalformedResponse: Rule(UNLIMITED, Verdict.FAILURE),
    InvalidAnswer: Rule(1, Verdict.FAILURE),
}
_OTHER = Rule(0, Verdict.FAILURE)


def is_transient(error: UpstreamError) -> bool:
    """Tell whether another attempt may succeed after a fault of an upstream.

    Not after one that it did not name itself (a redirect, a reply beyond all bounds, one that
    cannot be decoded), nor a status that says that the request is wrong (405, 501).
    """
    if error.refusal is None:
        return False
    status = error.refusal.status
    is_clients = 400 <= status < 500 and status not in (408, 409, 423, 424, 425, 429)
    return not is_clients and status not in (501, 505)


def rule(error: ProviderError) -> Rule:
    """Return the row of the table for a failure."""
    if isinstance(error, UpstreamError) and not is_transient(error):
        return _OTHER
    return next((RULES[kind] for kind in type(error).mro() if kind in RULES), _OTHER)


def backoff(attempts: int) -> float:
    """Return seconds to wait after so many failed attempts: exponential, with full jitter."""
    state = RetryCallState(_retrying, None, (), {})
    state.attempt_number = attempts
    return _backoff(state)


def max_attempts(retries: Iterable[int | None]) -> int:
    """Return the attempts that an input has, all routes together, from each route's `retries`.

    A route that says how often it is asked again has that many, and each other route has one.

    >>> max_attempts([None, None]), max_attempts([4, None]), max_attempts([0])
    (3, 6, 3)
    """
    numbers = list(retries)
    if all(number is None for number in numbers):
        return MAX_ATTEMPTS
    return max(MAX_ATTEMPTS, sum(number or 0 for number in numbers) + len(numbers))


class AttemptState(NamedTuple):
    """Where the inputs of a failed attempt stand."""

    here: int
    """Attempts at this route so far."""
    left: int
    """Attempts that may still be made, all routes together."""
    alternatives: int = 0
    """Other routes that were not asked yet, and may be."""
    retries: int | None = None
    """How often this route is asked again, by its configuration."""
    cooldown_s: float = 0.0
    """Seconds for which the route is to be left alone after a rate limit without a time."""
    time_left_s: float = float("inf")
    has_budget: bool = True
    """Whether the retry budget allows a retry."""
    is_ready: bool = True
    """Whether this route may be asked once more."""
    is_needed: bool = True
    """Whether anybody still waits."""
    is_limited: bool = False
    """Whether the rate limit was known before the attempt: then the wait for it is done."""
    client_retries: int | None = None
    """See `Context.client_retries`."""
    is_repeat: bool = False
    """Whether the same input has failed in another request a moment ago."""


class Retry(NamedTuple):
    """Ask the same route again, after so many seconds."""

    after_s: float


class NextRoute(NamedTuple):
    """Ask a route that was not asked yet."""


class GiveUp(NamedTuple):
    """Fail; `select_error` says with which error."""


Step: TypeAlias = Retry | NextRoute | GiveUp


def next_step(error: EmbeddingError, state: AttemptState) -> Step:
    """Return what to do after a failed attempt. Only failures of a provider go any further."""
    if not isinstance(error, ProviderError) or not state.is_needed:
        return GiveUp()
    wait = _retry_wait(error, state)
    if wait is not None:
        return Retry(wait)
    return NextRoute() if state.left > 0 and state.alternatives else GiveUp()


def may_retry(error: ProviderError, state: AttemptState) -> bool:
    """Tell whether the number of attempts allows another one at the same route."""
    if state.retries is not None:
        max_here = 1 + state.retries
    else:
        max_here = MAX_ATTEMPTS_BEFORE_FAILOVER if state.alternatives else UNLIMITED
    # Each alternative keeps one attempt in reserve.
    is_left = state.left > state.alternatives
    return is_left and state.here < max_here and state.here <= rule(error).retries


def _retry_wait(error: ProviderError, state: AttemptState) -> float | None:
    """Return the seconds after which the same route is asked again; None = it is not."""
    is_allowed = may_retry(error, state) and state.has_budget and state.is_ready
    if isinstance(error, LocalQueueFull) or not is_allowed:
        return None
    if _is_clients_to_repeat(error, state):
        return None
    requested_wait = error.retry_after or 0.0
    cooldown = state.cooldown_s if isinstance(error, RateLimited) else 0.0
    # Where another route is left, a wait that nobody asked for must be short.
    is_patient = error.retry_after is not None or not state.alternatives
    max_wait = MAX_WAIT_S if is_patient else MAX_WAIT_BEFORE_FAILOVER_S
    if (requested_wait or cooldown) >= min(max_wait, state.time_left_s):
        return None
    if requested_wait:
        return requested_wait
    return min(cooldown + backoff(state.here), MAX_WAIT_S, state.time_left_s)


def _is_clients_to_repeat(error: ProviderError, state: AttemptState) -> bool:
    """Tell whether another attempt is left to the client, which makes it by itself.

    Else each of its tries would be three of ours. After a rate limit that is so from the first try
    on of a client that says so; after another failure from the second on, also of one that only
    shows it. While a limit is known to be used up each request makes one attempt.
    """
    if isinstance(error, RateLimited):
        return state.is_limited or state.client_retries is not None
    is_passing = isinstance(error, UpstreamError | MalformedResponse)
    return is_passing and (bool(state.client_retries) or state.is_repeat)


def select_error(errors: Iterable[ProviderError]) -> ProviderError | None:
    """Return the failure to tell the client: the last that may pass, else the last."""
    selection: ProviderError | None = None
    for error in errors:
        if isinstance(error, TransientError) or not isinstance(selection, TransientError):
            selection = error
    return selection

"""The policy as a table: a failure and where its inputs stand in, a step out."""

import pytest
from embedding_proxy.providers.errors import (
    AuthenticationError,
    ConnectionTimeout,
    DeadlineExceeded,
    InvalidAnswer,
    InvalidRequest,
    LocalQueueFull,
    LoopDetected,
    MalformedResponse,
    ModelNotFound,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    Refusal,
    ScopedQuotaExceeded,
    TransientError,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from embedding_proxy.providers.routing.circuit_breaker import Verdict
from embedding_proxy.providers.routing.policy import (
    MAX_ATTEMPTS,
    MAX_WAIT_BEFORE_FAILOVER_S,
    MAX_WAIT_S,
    AttemptState,
    GiveUp,
    NextRoute,
    Retry,
    backoff,
    next_step,
    rule,
    select_error,
)
from hypothesis import given
from hypothesis import strategies as st


def error(kind, *, wait=None, status=503):
    """Return a failure of a provider."""
    return kind("p", "made up", Refusal(status, "made up", retry_after=wait))


FAULT = error(UpstreamError)
ALONE = AttemptState(here=1, left=2)
"""After the first attempt at the only route."""
FIRST_OF_TWO = AttemptState(here=1, left=2, alternatives=1)

# kind -> retries at the same route, what it counts for, whether for the model or the provider.
ROWS = [
    (RateLimited, 99, Verdict.NONE, True),
    (LocalQueueFull, 99, Verdict.NONE, True),
    (QuotaExceeded, 0, Verdict.NONE, False),
    (ScopedQuotaExceeded, 0, Verdict.NONE, True),
    (AuthenticationError, 0, Verdict.NONE, False),
    (PermissionDenied, 0, Verdict.NONE, True),
    (ModelNotFound, 0, Verdict.NONE, True),
    (LoopDetected, 0, Verdict.NONE, True),
    (UpstreamError, 99, Verdict.FAILURE, True),
    (UpstreamTimeout, 0, Verdict.FAILURE, True),
    (ConnectionTimeout, 0, Verdict.FAILURE, False),
    (Unreachable, 1, Verdict.FAILURE, False),
    (MalformedResponse, 99, Verdict.FAILURE, True),
    (InvalidAnswer, 1, Verdict.FAILURE, True),
    (TransientError, 0, Verdict.FAILURE, True),
    (ProviderError, 0, Verdict.FAILURE, True),
]


@pytest.mark.parametrize(("kind", "retries", "verdict", "is_of_model"), ROWS)
def test_each_class_of_failure_has_its_row(kind, retries, verdict, is_of_model):
    """A class without a row of its own has that of the class above, or the careful one."""
    found = rule(error(kind))
    assert (found.retries, found.verdict, found.is_of_model) == (retries, verdict, is_of_model)


@pytest.mark.parametrize(("status", "retries"), [(405, 0), (501, 0), (505, 0), (500, 99)])
def test_a_status_that_says_that_the_call_is_wrong_is_not_repeated(status, retries):
    """Nor is a fault that the upstream did not name itself."""
    assert rule(error(UpstreamError, status=status)).retries == retries
    assert rule(UpstreamError("p", "a redirect")).retries == 0


@pytest.mark.parametrize("kind", [kind for kind, retries, *_ in ROWS if not retries])
@pytest.mark.parametrize(
    ("standing", "step"),
    [
        (ALONE, GiveUp()),
        (FIRST_OF_TWO, NextRoute()),
        (FIRST_OF_TWO._replace(left=0), GiveUp()),
        (FIRST_OF_TWO._replace(is_needed=False), GiveUp()),
        (FIRST_OF_TWO._replace(has_budget=False), NextRoute()),
    ],
)
def test_what_asking_again_does_not_mend_goes_on_at_once(kind, standing, step):
    """To the next route while attempts are left; a failover needs no budget."""
    assert next_step(error(kind), standing) == step


@pytest.mark.parametrize(
    ("standing", "is_retried"),
    [
        (ALONE, True),
        (FIRST_OF_TWO, True),
        (AttemptState(here=2, left=1), True),
        (AttemptState(here=3, left=0), False),
        (AttemptState(here=2, left=1, alternatives=1), False),
        (AttemptState(here=1, left=2, alternatives=2), False),
        (AttemptState(here=1, left=5, alternatives=1, retries=4), True),
        (AttemptState(here=5, left=1, alternatives=1, retries=4), False),
        (AttemptState(here=1, left=2, retries=0), False),
        (ALONE._replace(has_budget=False), False),
        (ALONE._replace(is_ready=False), False),
        (ALONE._replace(is_needed=False), False),
        (ALONE._replace(time_left_s=0.0), False),
        (ALONE._replace(client_retries=0), True),
        (ALONE._replace(client_retries=1), False),
        (ALONE._replace(is_repeat=True), False),
    ],
)
def test_when_a_passing_fault_is_tried_again_at_the_same_route(standing, is_retried):
    """Within the attempts, the budget, the time; not in place of a client that does so itself."""
    step = next_step(FAULT, standing)
    assert isinstance(step, Retry) is is_retried
    if not is_retried:
        goes_on = standing.alternatives and standing.left and standing.is_needed
        assert step == (NextRoute() if goes_on else GiveUp())


@pytest.mark.parametrize(
    ("wait", "standing", "step"),
    [
        (3.0, ALONE, Retry(3.0)),
        (3.0, FIRST_OF_TWO, Retry(3.0)),
        (MAX_WAIT_S, ALONE, GiveUp()),
        (MAX_WAIT_S, FIRST_OF_TWO, NextRoute()),
        (3.0, ALONE._replace(time_left_s=3.0), GiveUp()),
        (None, FIRST_OF_TWO._replace(cooldown_s=MAX_WAIT_BEFORE_FAILOVER_S), NextRoute()),
        (3.0, ALONE._replace(is_limited=True), GiveUp()),
        (3.0, ALONE._replace(client_retries=0), GiveUp()),
    ],
)
def test_a_rate_limit_is_waited_out_where_that_is_short(wait, standing, step):
    """To the letter where it names a time; else it is the next route's, or the client's."""
    assert next_step(error(RateLimited, wait=wait, status=429), standing) == step


@pytest.mark.parametrize("standing", [ALONE, FIRST_OF_TWO])
@pytest.mark.parametrize("failure", [InvalidRequest("no"), DeadlineExceeded("late")])
def test_what_is_no_providers_failure_ends_the_matter(failure, standing):
    """No other provider would take it."""
    assert next_step(failure, standing) == GiveUp()


@pytest.mark.parametrize("standing", [ALONE, FIRST_OF_TWO])
def test_a_full_queue_is_not_waited_for_twice(standing):
    """It is the next route's, or the client's."""
    step = next_step(LocalQueueFull("p", "full"), standing)
    assert step == (NextRoute() if standing.alternatives else GiveUp())


@given(
    st.sampled_from([kind for kind, *_ in ROWS]),
    st.none() | st.floats(0, 100),
    st.builds(
        AttemptState,
        here=st.integers(1, 5),
        left=st.integers(0, 5),
        alternatives=st.integers(0, 3),
        cooldown_s=st.floats(0, 60),
        time_left_s=st.floats(0, 60),
        has_budget=st.booleans(),
    ),
)
def test_no_step_breaks_a_bound(kind, wait, standing):
    """No retry without attempts, budget and time; no attempt beyond those that are left."""
    step = next_step(error(kind, wait=wait), standing)
    if isinstance(step, Retry):
        assert standing.left > standing.alternatives
        assert standing.has_budget
        assert step.after_s <= min(MAX_WAIT_S, standing.time_left_s)
    elif isinstance(step, NextRoute):
        assert standing.left
        assert standing.alternatives


def test_waits_grow_and_are_drawn_at_random():
    """Callers that fail together do not come back together."""
    assert len({backoff(1) for _ in range(20)}) == 20
    assert max(backoff(1) for _ in range(100)) <= 0.4
    assert max(backoff(20) for _ in range(100)) <= 4.0
    assert MAX_ATTEMPTS == 3


def test_the_failure_that_may_pass_is_told():
    """Of several the last, so that the client comes back if any provider may do better then."""
    lasting, passing = error(ModelNotFound), error(UpstreamError)
    assert select_error([passing, lasting]) is passing
    assert select_error([lasting, passing]) is passing
    assert select_error([error(QuotaExceeded), lasting]) is lasting
    assert select_error([]) is None

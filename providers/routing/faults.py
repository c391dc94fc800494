"""One table: what a provider's failure means for the next attempt, and for its breaker.

Whether the next route is asked is not in it: after a ProviderError it always is, after any other
error never. `Full` is not in it: no attempt was made, and nothing follows from it.
"""

from dataclasses import dataclass

from providers.base import (
    ConnectionTimeout,
    CredentialsRefused,
    InvalidAnswer,
    LoopDetected,
    ModelNotFound,
    OutOfCredit,
    PermissionDenied,
    ProviderError,
    RateLimited,
    ScopedQuotaExceeded,
    Unreachable,
    Unreadable,
    UpstreamFault,
    UpstreamTimeout,
)

from .breaker import Verdict

OFTEN = 99
"""As often as attempts are left."""

NO_CREDIT_REST = 300.0
NO_KEY_REST = 30.0
"""Seconds; short, since a key is mended by hand, and whoever does it watches."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What follows from a failure."""

    again: int
    """How many more times the same provider is asked, at most."""
    verdict: Verdict
    trips: float | None = None
    """Seconds for which the provider is not asked at all; then one call has to prove it well."""
    why: str = ""
    """What it is not asked for, in a few words."""
    is_of_model: bool = True
    """Whether it concerns the model that was asked for, and not the provider as a whole."""
    is_of_request: bool = False
    """Whether another request for the same model may be answered."""


_TABLE: dict[type[ProviderError], Rule] = {
    RateLimited: Rule(OFTEN, Verdict.NONE),
    OutOfCredit: Rule(0, Verdict.NONE, NO_CREDIT_REST, "out of credit", is_of_model=False),
    ScopedQuotaExceeded: Rule(0, Verdict.NONE, is_of_request=True),
    CredentialsRefused: Rule(0, Verdict.NONE, NO_KEY_REST, "key refused", is_of_model=False),
    PermissionDenied: Rule(0, Verdict.NONE, is_of_request=True),
    ModelNotFound: Rule(0, Verdict.NONE),
    LoopDetected: Rule(0, Verdict.NONE),
    UpstreamFault: Rule(OFTEN, Verdict.BAD),
    UpstreamTimeout: Rule(0, Verdict.BAD),
    ConnectionTimeout: Rule(0, Verdict.BAD, is_of_model=False),
    Unreachable: Rule(1, Verdict.BAD, is_of_model=False),
    Unreadable: Rule(OFTEN, Verdict.BAD),
    InvalidAnswer: Rule(1, Verdict.BAD),
}
_OTHER = Rule(0, Verdict.BAD)


def is_passing(error: UpstreamFault) -> bool:
    """Tell whether asking again may mend a fault of an upstream.

    Not one that it did not name itself (a redirect, a reply beyond all bounds, one that cannot be
    decoded), nor a status that says that it is asked in the wrong way (405, 501).
    """
    if error.refusal is None:
        return False
    status = error.refusal.status
    is_clients = 400 <= status < 500 and status not in (408, 409, 423, 424, 425, 429)
    return not is_clients and status not in (501, 505)


def rule(error: ProviderError) -> Rule:
    """Return what follows from a failure."""
    if isinstance(error, UpstreamFault) and not is_passing(error):
        return _OTHER
    return next((_TABLE[kind] for kind in type(error).mro() if kind in _TABLE), _OTHER)

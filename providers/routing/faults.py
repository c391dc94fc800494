"""One table: what a provider's failure means for the next attempt, and for its breaker.

Whether the next route is asked is not in it: after a ProviderError it always is, after any other
error never. `Full` is not in it: no attempt was made, and nothing follows from it.
"""

from dataclasses import dataclass

from providers.base import (
    CredentialsRefused,
    InvalidAnswer,
    LoopDetected,
    ModelNotFound,
    OutOfCredit,
    ProviderError,
    RateLimited,
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


_TABLE: dict[type[ProviderError], Rule] = {
    RateLimited: Rule(OFTEN, Verdict.NONE),
    OutOfCredit: Rule(0, Verdict.NONE, NO_CREDIT_REST, "out of credit"),
    CredentialsRefused: Rule(0, Verdict.NONE, NO_KEY_REST, "key refused"),
    ModelNotFound: Rule(0, Verdict.NONE),
    LoopDetected: Rule(0, Verdict.NONE),
    UpstreamFault: Rule(OFTEN, Verdict.BAD),
    UpstreamTimeout: Rule(0, Verdict.BAD),
    Unreachable: Rule(1, Verdict.BAD),
    Unreadable: Rule(OFTEN, Verdict.BAD),
    InvalidAnswer: Rule(1, Verdict.BAD),
}
_OTHER = Rule(0, Verdict.BAD)


def rule(error: ProviderError) -> Rule:
    """Return what follows from a failure.

    A fault that the upstream did not name itself (a redirect, a reply beyond all bounds) is one
    that asking again does not mend.
    """
    if isinstance(error, UpstreamFault) and error.refusal is None:
        return _OTHER
    return next((_TABLE[kind] for kind in type(error).mro() if kind in _TABLE), _OTHER)

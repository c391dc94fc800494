"""The retry budget of all requests together: a token bucket, as in gRPC's retry throttling.

A failed attempt takes a token, a success gives back SUCCESS_TOKENS, and one returns each second.
Retries, hedges and searches for a bad input are made while at least half of the tokens are there.
So an outage adds at most a fifth to the calls, and ten within ten seconds in any case. The first
attempt at another route needs no token: the circuit breaker of that route bounds it.
"""

from collections.abc import Callable

MAX_TOKENS = 20.0
SUCCESS_TOKENS = 0.2
TOKENS_PER_S = 1.0


class RetryBudget:
    """The tokens of all models and providers together. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = MAX_TOKENS
        self._at: float | None = None

    @property
    def tokens(self) -> float:
        """The tokens that are there now."""
        now = self._clock()
        if self._at is not None and now > self._at:
            self._tokens = min(MAX_TOKENS, self._tokens + (now - self._at) * TOKENS_PER_S)
        self._at = now
        return self._tokens

    @property
    def can_retry(self) -> bool:
        """Whether another retry is within the budget."""
        return self.tokens >= MAX_TOKENS / 2

    def take(self) -> None:
        """Take a token, for a failed attempt or a hedge."""
        self._tokens = max(0.0, self.tokens - 1)

    def give_back(self) -> None:
        """Give back a part of a token for an attempt that was answered."""
        if self._tokens < MAX_TOKENS:
            self._tokens = min(MAX_TOKENS, self.tokens + SUCCESS_TOKENS)

"""What an upstream takes in one call, and how many calls at a time."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one provider; None means that there is none, or that none is known."""

    inputs: int = 2048
    """Inputs in one call."""
    tokens: int | None = 300_000
    """Tokens in one call, all inputs together."""
    concurrency: int = 8
    """Calls at the same time."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

"""What an upstream takes in one call, how many calls at a time, and how long one may last."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one provider; None means that there is none, or that none is known."""

    inputs: int = 2048
    """Inputs in one call."""
    tokens: int | None = 300_000
    """Tokens in one call, all inputs together."""
    concurrency: int = 8
    """Calls at the same time."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    learn: bool = True
    """Whether the limits that the upstream tells in its headers (`x-ratelimit-…`) are kept too."""
    bytes: int | None = None
    """Bytes of all texts in one call together; learned, where larger calls are refused."""

    def share(self, processes: int) -> "Limits":
        """Return what one of so many processes may use, so that all together keep to the limits.

        Each makes at least one call at a time: with more processes than `concurrency` there may be
        as many calls as processes. What is allowed a minute is divided exactly.

        >>> Limits(concurrency=8, requests_per_minute=3).share(2).requests_per_minute
        1.5
        >>> [Limits(concurrency=8).share(n).concurrency for n in (1, 2, 3, 16)]
        [8, 4, 2, 1]
        """
        if processes == 1:
            return self
        requests, tokens = self.requests_per_minute, self.tokens_per_minute
        return replace(
            self,
            concurrency=max(1, self.concurrency // processes),
            requests_per_minute=None if requests is None else requests / processes,
            tokens_per_minute=None if tokens is None else tokens / processes,
        )


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long one attempt may take, in seconds; the request's own deadline ends it earlier."""

    total_s: float = 60.0
    """From the first byte sent to the last received."""
    connect_s: float = 10.0
    first_byte_s: float | None = None
    """Until the upstream begins to answer; None leaves it to the total."""
    least_bytes_per_s: float = 100.0
    """A reply that arrives slower than this, over a whole window, is given up."""
    rate_window_s: float = 15.0


def limits_of(provider: object) -> Limits:
    """Return what a provider says it takes in a call; the usual where it says nothing."""
    limits = getattr(provider, "limits", None)
    return limits if isinstance(limits, Limits) else Limits()

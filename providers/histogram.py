"""A histogram of durations: counts by bucket and their sum, as Prometheus defines it."""

from bisect import bisect_left
from collections.abc import Iterator

BOUNDS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0),
)
"""Upper bounds of the buckets in seconds: from a hit that memory answers to a provider's longest
call. What is longer is in a last bucket without a bound."""
BOUND_NAMES = (*map(str, BOUNDS_S), "+Inf")
"""What Prometheus calls the buckets: the label `le`."""


class Histogram:
    """Durations in seconds since the start of the process. For one thread."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        """Observations by bucket, each in one bucket only."""
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Add a duration.

        >>> histogram = Histogram()
        >>> histogram.observe(0.02)
        >>> histogram.counts[BOUNDS_S.index(0.025)]
        1
        """
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def plus(self, other: "Histogram | None") -> "Histogram":
        """Return the durations of both."""
        sums = Histogram()
        for histogram in (self, other) if other is not None else (self,):
            sums.counts = [a + b for a, b in zip(sums.counts, histogram.counts, strict=True)]
            sums.sum_s += histogram.sum_s
        return sums

    @property
    def count(self) -> int:
        """How many durations were observed."""
        return sum(self.counts)

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Yield the names of the buckets, each with what is in it alone."""
        return zip(BOUND_NAMES, self.counts, strict=True)

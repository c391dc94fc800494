"""What was answered, and how: counts that are summed by what they are about (see `ledger`)."""

from operator import add
from typing import NamedTuple


class Usage(NamedTuple):
    """Sums over inputs: `inputs = duplicates + hits + joins + misses`."""

    hits: int = 0
    joins: int = 0
    misses: int = 0
    duplicates: int = 0
    tokens_saved: int = 0
    """Tokens of all that was not bought for the request that asked."""
    tokens_billed: int = 0
    """Tokens that upstreams charged, by their own account where they gave one."""
    nanodollars_saved: int = 0
    """10⁻⁹ USD: what the tokens saved cost at the model's list price."""
    nanodollars_billed: int = 0

    def plus(self, other: "Usage") -> "Usage":
        """Return the sums of both."""
        return Usage(*map(add, self, other))

    @property
    def unpaid(self) -> "Usage":
        """What was answered without buying."""
        if not (self.misses or self.tokens_billed or self.nanodollars_billed):
            return self
        return self._replace(misses=0, tokens_billed=0, nanodollars_billed=0)

    @property
    def inputs(self) -> int:
        """All inputs."""
        return self.hits + self.joins + self.misses + self.duplicates

    @property
    def hit_rate(self) -> float:
        """The share of inputs for which nothing was bought, 0…1; 0 without inputs."""
        return 1 - self.misses / self.inputs if self.inputs else 0.0


NOTHING = Usage()

"""What was answered, and how: counts that are summed by what they are about (see `ledger`).

What was paid, to whom and by whom, and what was not: what the sums are about.

Counting adds to numbers in memory, and they are written with the next change or in a while. A
charge is counted as soon as it is known, so before what was bought with it is written. The sums on
disk are read by `disk.ledger_reader`.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, NamedTuple, Protocol, TypeAlias

from embedding_proxy.providers.base import Embedded, Vector
from embedding_proxy.providers.billing import Account, Bill

from .key import OTHER, OTHER_NAMESPACE, Key, Partition


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


MAX_HEADINGS = 1000
"""Headings that have a line of their own: of a process since its start, and of a day on disk."""


class Heading(NamedTuple):
    """What one line of the ledger is about, beside the day."""

    partition: Partition
    model: str = ""
    """The name that clients asked for."""
    provider: str = ""
    """Who was paid; empty where nobody was."""
    client: str = ""
    """The name of a client's key; empty where none is asked for."""

    @property
    def rest(self) -> "Heading":
        """The heading under which this one is summed where there are too many others.

        The provider stays: providers come from the configuration, all else may be a client's word.
        """
        return Heading(Partition(OTHER_NAMESPACE, OTHER, 0), OTHER, self.provider, OTHER)


class Reusable(Protocol):
    """The same request once more; see `cached_hit`."""

    async def vectors(self) -> Sequence[Vector] | None:
        """Return what it is answered with now, and count it; None if it has to be asked anew.

        Where there are many, others get their turn.
        """

    def count(self) -> None:
        """Count an answer that is given."""

    def reuse_of(self, vectors: Sequence[Vector]) -> Callable[[], bool] | None:
        """Return what tells whether these vectors are still the answer, and if so, counts it.

        None if they are not the answer any more.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(Embedded):
    """An answer, and its sums."""

    usage: Usage
    keys: Sequence[Key] = ()
    """Where each vector is kept; empty where more than one look-up was needed."""
    again: Reusable | None = None
    """For the same request once more; None where that has to be asked anew."""


def ledger_key(partition: Partition, account: Account, provider: str = "") -> Heading:
    """Return where a request's inputs, or what a provider charged for them, are counted."""
    return Heading(partition, account.model, provider, account.client)


def charge_usage(bill: Bill) -> Usage:
    """Return the sums of one charge."""
    return Usage(tokens_billed=sum(bill.tokens), nanodollars_billed=sum(bill.nanodollars))


class By(enum.StrEnum):
    """What the ledger can be summed by: columns of its table, and of that of the partitions."""

    DAY = "day"
    MODEL = "model"
    PROVIDER = "provider"
    CLIENT = "client"
    NAMESPACE = "namespace"
    SPACE = "space"


Line: TypeAlias = tuple[tuple[Any, ...], Usage]
"""What some sums are about, and the sums."""

"""Accounts, charges and bills: who pays, and what an upstream charges for a call.

Nothing is counted here: `cache.ledger.PurchaseLedger` counts the bills, by provider, model, client
and namespace, and `cache.disk.writer` writes the sums.

Money is counted in whole nanodollars (10⁻⁹ USD), so that sums are the same in any order. A token of
a model at $0.005 per million costs five of them.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, NamedTuple, TypeAlias

NANO = 1_000_000_000
"""Nanodollars a dollar."""
MAX_NANODOLLARS = 1 << 50
"""About a million dollars: no call costs more, whatever it says."""


Period: TypeAlias = Literal["day", "month", "ever"]
"""Of UTC's calendar."""
_DAY_S = 86_400


class SpendingLimit(NamedTuple):
    """What the purchases of a client may cost."""

    nanodollars: int
    period: Period = "ever"

    def first_day(self, now: float) -> int:
        """Return the day on which the period began that holds a time, in days since 1970.

        >>> SpendingLimit(1, "month").first_day(20_000.5 * 86_400)
        19997
        """
        day = int(now // _DAY_S)
        if self.period == "month":
            day -= datetime.fromtimestamp(now, UTC).day - 1
        return 0 if self.period == "ever" else day


class Decision(enum.IntEnum):
    """Whether a purchase on a client's budget may begin."""

    WAIT = 0
    """Others are under way, and with them it may not fit."""
    RESERVED = 1
    EXCEEDED = 2


class SpendingAnswer(NamedTuple):
    """What was decided for all nodes, and the nanodollars that the other nodes have billed."""

    decision: Decision
    others: int


LEASE_S = 60
"""Seconds after which what a node has reserved of a budget lapses, unless it is renewed."""


@dataclass(frozen=True, slots=True)
class Account:
    """On whose account a request goes, and what its tokens are worth."""

    model: str = ""
    """The name that the client asked for."""
    client: str = ""
    """The name of the client's key; empty where none is asked for."""
    price: float = 0.0
    """The model's list price in USD per million tokens: what is saved when nothing is bought."""
    limit: SpendingLimit | None = None
    """What the client's purchases may cost; None = any amount."""


NOBODY = Account()


class Charge(NamedTuple):
    """What an upstream says that it charges for a call; None where it does not say."""

    tokens: int | None = None
    nanodollars: int | None = None


@dataclass(frozen=True, slots=True)
class Bill:
    """What was charged for one call, shared among its inputs: n of everything, adding up."""

    provider: str
    places: Sequence[int]
    """Of the inputs, in the call of whoever is told."""
    tokens: Sequence[int]
    nanodollars: Sequence[int]
    told: bool = False
    """Whether the upstream named the cost itself; else it is tokens at the price known here."""

    def at(self, whole: Sequence[int]) -> "Bill":
        """Return the bill as it reads in a larger call, whose inputs at `whole` these are."""
        places = [whole[place] for place in self.places]
        return Bill(self.provider, places, self.tokens, self.nanodollars, self.told)

    def rows(self, rows: Sequence[int]) -> "Bill":
        """Return the part of the bill that is in some rows of it."""
        return replace(
            self,
            places=[self.places[i] for i in rows],
            tokens=[self.tokens[i] for i in rows],
            nanodollars=[self.nanodollars[i] for i in rows],
        )


OnCharge: TypeAlias = Callable[[Bill], None]
"""Takes the bill of each call that an upstream charges for, as soon as its answer is read: also of
one whose answer was no good, or came to nothing later. Never raises."""


def nanodollars(tokens: int, price: float) -> int:
    """Return what tokens cost at a price in USD per million.

    >>> nanodollars(1_000_000, 0.02) == NANO * 2 // 100
    True
    """
    return round(min(tokens * price * 1000, MAX_NANODOLLARS))

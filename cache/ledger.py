"""Usage, and the ledger that sums it by day, partition, model, provider and client.

The sums of the last HOURS_KEPT hours are kept by hour too, by model and client.

Sums grow in memory and are written with the next transaction, or after a while. A charge is counted
as soon as it is known, so before the record that it paid for is written. `disk.ledger_reader` reads
the sums on disk.
"""

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple, Protocol, TypeAlias

from embedding_proxy.providers.charge import Account, Bill

from .key import OTHER, OTHER_NAMESPACE, Partition


class Usage(NamedTuple):
    """Sums over inputs: `inputs = duplicates + hits + joins + misses`."""

    hits: int = 0
    joins: int = 0
    misses: int = 0
    duplicates: int = 0
    tokens_saved: int = 0
    """Tokens of the inputs that were not bought for this request."""
    tokens_billed: int = 0
    """Tokens that upstreams charged, as they say where they say so."""
    nanodollars_saved: int = 0
    """10⁻⁹ USD: what the tokens saved cost at the model's list price."""
    nanodollars_billed: int = 0

    def plus(self, other: "Usage") -> "Usage":
        """Return the sums of both."""
        return tuple.__new__(Usage, map(add, self, other))

    @property
    def unpaid(self) -> "Usage":
        """The sums without the misses and their cost."""
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

MAX_LEDGER_KEYS = 1000
"""Ledger keys with a line of their own: of a process since its start, and of a day on disk."""
HOURS_KEPT = 62 * 24
"""So many hours have sums of their own."""
MAX_HOUR_LINES = 100
"""Lines of an hour, by model and client; what comes later is one more line."""


class LedgerKey(NamedTuple):
    """The key of one line of the ledger, beside the day."""

    partition: Partition
    model: str = ""
    """The name that clients asked for."""
    provider: str = ""
    """The provider that charged; empty if none did."""
    client: str = ""
    """The name of the client's key; empty if the proxy asks for none."""

    @property
    def rest(self) -> "LedgerKey":
        """The key under which this one is summed beyond MAX_LEDGER_KEYS.

        It keeps the provider: providers come from the configuration, clients may choose the rest.
        """
        return LedgerKey(Partition(OTHER_NAMESPACE, OTHER, 0), OTHER, self.provider, OTHER)


class LimitedLedgerKey(LedgerKey):
    """The key of a line that a client's budget is held to: its `rest` keeps the client, too.

    It equals a LedgerKey of the same fields.
    """

    __slots__ = ()

    @property
    def rest(self) -> LedgerKey:
        """As in a LedgerKey; the clients with budgets come from the configuration."""
        return LimitedLedgerKey(*super().rest)._replace(client=self.client)


def ledger_key(partition: Partition, account: Account, provider: str = "") -> LedgerKey:
    """Return the key under which inputs of a request, or a provider's charge, are counted."""
    kind = LedgerKey if account.limit is None else LimitedLedgerKey
    return kind(partition, account.model, provider, account.client)


def charge_usage(bill: Bill) -> Usage:
    """Return the sums of one charge."""
    return Usage(tokens_billed=sum(bill.tokens), nanodollars_billed=sum(bill.nanodollars))


class PurchaseLedger:
    """Counts one purchase: each charge, and each input that came, for the provider that was paid.

    An input is named by its place in the purchase.
    """

    def __init__(
        self, count: Callable[[LedgerKey, Usage], None], partition: Partition, account: Account
    ) -> None:
        """`count` adds to the sums of the store."""
        self._add = count
        self._partition = partition
        self._account = account
        self._providers: dict[int, str] = {}
        """Who was paid last for the input at a place."""
        self.charged = NOTHING
        """The sums of all charges so far; inputs are not in it."""
        self.is_written = True
        """Whether all that was counted so far goes with a write that has begun; the purchase says
        when one begins."""

    def count_charge(self, bill: Bill) -> None:
        """Count what was charged for a call."""
        self._providers.update(dict.fromkeys(bill.places, bill.provider))
        usage = charge_usage(bill)
        self.charged = self.charged.plus(usage)
        self._count(bill.provider, usage)

    def count_inputs(self, places: Sequence[int]) -> None:
        """Count inputs that have come, each once, as misses: after the charges for them."""
        for provider, inputs in Counter(self._providers.get(p, "") for p in places).items():
            self._count(provider, Usage(misses=inputs))

    def _count(self, provider: str, usage: Usage) -> None:
        self.is_written = False
        self._add(ledger_key(self._partition, self._account, provider), usage)


class By(enum.StrEnum):
    """Columns that the ledger can be grouped by: of its table, or of table `Partitions`."""

    DAY = "day"
    MODEL = "model"
    PROVIDER = "provider"
    CLIENT = "client"
    NAMESPACE = "namespace"
    SPACE = "space"


class LedgerFilter(NamedTuple):
    """Which lines of the ledger are summed."""

    client: str | None = None
    """None = those of all clients."""
    first_day: int = 0
    """Days since 1970, UTC."""
    end_day: int | None = None
    """The first day that is left out; None = none is."""
    model: str | None = None
    """None = those of all models."""


ALL_LINES = LedgerFilter()

Line: TypeAlias = tuple[tuple[Any, ...], Usage]
"""The values of the grouped columns, and their sums."""

COLUMNS = (By.MODEL, By.PROVIDER, By.CLIENT, By.NAMESPACE, By.SPACE)
"""By what a node tells its sums to others; beside these, by day alone."""


class NodeSums(Protocol):
    """The sums that a node has told."""

    @property
    def sums(self) -> Sequence[Line]:
        """By COLUMNS."""

    @property
    def days(self) -> Sequence[Line]:
        """By day."""


def add_up(nodes: Sequence[NodeSums], by: Sequence[By]) -> list[Line] | None:
    """Return the sums of all nodes by some of COLUMNS, or by day alone; None for other columns."""
    if list(by) == [By.DAY]:
        places, lines = [0], [line for node in nodes for line in node.days]
    elif By.DAY in by:
        return None
    else:
        places = [COLUMNS.index(column) for column in by]
        lines = [line for node in nodes for line in node.sums]
    sums: dict[tuple[Any, ...], Usage] = {}
    for names, usage in lines:
        chosen = tuple(names[place] for place in places)
        sums[chosen] = sums[chosen].plus(usage) if chosen in sums else usage
    return sorted(sums.items(), key=lambda line: tuple(map(str, line[0])))


class LedgerSums(NamedTuple):
    """The sums of some days, three times: by day, by model and by client."""

    days: dict[int, Usage]
    """By days since 1970, UTC."""
    models: dict[str, Usage]
    """The first MAX_LEDGER_KEYS; those beyond are summed under OTHER."""
    clients: dict[str, Usage]
    """Likewise."""

    @property
    def total(self) -> Usage:
        """The sums of all days."""
        return reduce(Usage.plus, self.days.values(), NOTHING)

    @classmethod
    def empty(cls) -> "LedgerSums":
        """Return the sums of nothing."""
        return cls({}, {}, {})

    def add(self, other: "LedgerSums") -> None:
        """Add other sums to these, in place."""
        for day, usage in other.days.items():
            self.days[day] = self.days.get(day, NOTHING).plus(usage)
        for own, more in ((self.models, other.models), (self.clients, other.clients)):
            for name, usage in more.items():
                is_full = len(own) >= MAX_LEDGER_KEYS and name not in own
                place = OTHER if is_full else name
                own[place] = own.get(place, NOTHING).plus(usage)

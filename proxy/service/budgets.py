"""Holds clients to their budgets: what a client's name was billed in a period bounds what it buys.

The ledger on disk has the sums of all processes. It is read before each purchase, after what this
process has counted was written. A purchase reserves the most that it may cost at the highest list
price of the model and its routes. It begins if this process buys nothing else for the client, or if
all that is reserved still fits into the process's share of what is left. So a budget is passed by
the last purchase of each worker at most, however many requests come at the same time; a purchase
that does not fit waits for the others to end. What an upstream charges above its list price is not
reserved.

With `SharedSpending` the same holds for all nodes together: one of them reserves at a time, and the
whole rest of a budget is open to each. While that cannot be asked, a node buys within its share of
what is left by what it knew last, and tells later what its ledger says.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import NamedTuple, Protocol

from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.errors import BudgetExceeded
from embedding_proxy.cache.ledger import By, LedgerFilter
from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Context, Embedded, Embedder, Input, Space
from embedding_proxy.providers.charge import (
    LEASE_S,
    NANO,
    Bill,
    Decision,
    Period,
    SpendingAnswer,
    SpendingLimit,
    nanodollars,
)

MIN_POLL_S, MAX_POLL_S = 0.01, 0.5
"""How often a purchase that waits for those of other nodes asks again: first, and at last."""
MAX_PUBLISHED = MAX_ENDED = 10_000

_PERIODS: dict[Period, str] = {
    "day": "of this day (UTC)",
    "month": "of this month (UTC)",
    "ever": "in all",
}


class SharedSpending(Protocol):
    """The budgets of clients on all nodes: see `cache.shared.client_budget`. Never raises."""

    async def reserve(  # noqa: PLR0913 - by name
        self, name: str, first_day: int, *, here: int, limit: int, amount: int, purchase: str
    ) -> SpendingAnswer | None:
        """Reserve an amount if it fits; None = the other nodes cannot be asked now."""

    async def renew(
        self, name: str, first_day: int, *, here: int, amount: int, purchase: str
    ) -> None:
        """Keep the reservation of a purchase that is under way."""

    async def settle(
        self, name: str, first_day: int, *, here: int, ended: Iterable[str] = ()
    ) -> SpendingAnswer | None:
        """Tell what this node has billed, and which purchases have ended."""


class Budgets:
    """What clients have spent, by name, and what is reserved. For one event loop."""

    def __init__(
        self, store: Store, workers: int = 1, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`workers` processes share the budgets; `clock` gives seconds since 1970."""
        self._store = store
        self._workers = workers
        self._clock = clock
        self._clients: dict[str, _ClientSpending] = {}
        self._shared: SharedSpending | None = None
        self._count_nodes: Callable[[], int] = lambda: 1
        self._published: dict[tuple[str, int], int] = {}
        """What the other nodes were told by `publish`, by client and first day of the period."""
        self._tasks: set[asyncio.Task[None]] = set()
        """What is told of purchases that have ended."""

    def share(self, spending: SharedSpending, count_nodes: Callable[[], int]) -> None:
        """Hold clients to their budgets on all nodes together."""
        self._shared, self._count_nodes = spending, count_nodes

    async def aclose(self) -> None:
        """Wait until the other nodes were told of all purchases that have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def publish(self, *, is_complete: bool = False) -> None:
        """Tell the other nodes what this one has billed, as far as they were not told.

        `is_complete`: tell all, to a server that knows nothing of it. Called now and then; a node
        that could not tell, or was killed, makes up for it here.
        """
        if self._shared is None:
            return
        if is_complete:
            self._published.clear()
        now = self._clock()
        for period in _PERIODS:
            first_day = SpendingLimit(0, period).first_day(now)
            ended = {
                name: ends
                for name, client in self._clients.items()
                if (ends := client.ended_in(first_day))
            }
            if ended and not await self._store.flush_counts():
                ended = {}
            lines = await self._store.ledger([By.CLIENT], lines=LedgerFilter(None, first_day))
            if lines is None:
                return
            sums = {name: usage.nanodollars_billed for (name,), usage in lines}
            for name in sums.keys() | ended.keys():
                here, ends = sums.get(name, 0), ended.get(name, frozenset())
                is_told = not here or self._published.get((name, first_day)) == here
                if is_told and not ends:
                    continue
                if not await self._settle(self._shared, name, _Billed(first_day, here, here, ends)):
                    return
                if len(self._published) >= MAX_PUBLISHED:
                    self._published.clear()
                self._published[name, first_day] = here

    async def billed(self, name: str, limit: SpendingLimit) -> int:
        """Return the nanodollars that a client was billed in the present period, by all nodes.

        While the ledger cannot be written or read, it is what is known in this process; while the
        other nodes cannot be asked, it is with what they had billed when they were asked last.
        """
        here = await self._billed_here(name, limit)
        client = self._client(name)
        if self._shared is not None:
            await self._settle(self._shared, name, here)
        return here.at_most + client.others

    async def _billed_here(self, name: str, limit: SpendingLimit) -> "_Billed":
        """Return the same of this node alone.

        One at a time reads for a client, and what it finds is for all that asked before it began.
        """
        client = self._client(name)
        client.asked += 1
        asked = client.asked
        async with client.reading:
            first_day = limit.first_day(self._clock())
            if client.billed.first_day != first_day:
                client.begin(first_day)
            elif client.answered >= asked:
                return client.billed
            answered, charged, ended = client.asked, client.charged, client.ended_in(first_day)
            known = await self._read(name, first_day)
            if known is None:
                # What was charged while the sum was read may be in the sum, or not.
                at_least = client.known + client.charged - client.charged_after
                at_most = client.known + client.charged - client.charged_before
            else:
                client.known, client.charged_before = known, charged
                client.charged_after = client.charged
                at_least = at_most = known
            client.billed = _Billed(first_day, at_least, at_most, ended)
            client.answered = answered
            return client.billed

    async def _read(self, name: str, first_day: int) -> int | None:
        """Return the nanodollars in the ledger, once all is written; None if that fails."""
        if not await self._store.flush_counts():
            return None
        lines = await self._store.ledger([], lines=LedgerFilter(name, first_day))
        return None if lines is None else sum(usage.nanodollars_billed for _, usage in lines)

    @asynccontextmanager
    async def purchase(
        self, name: str, limit: SpendingLimit, amount: int
    ) -> AsyncIterator[Callable[[Bill], None]]:
        """Let the block buy on a client's account, and give what is told its charges.

        `amount` is the most that it may cost, in nanodollars; 0 = that is not known, and the client
        buys nothing else meanwhile. Waits until there is room. Raises BudgetExceeded.
        """
        client = self._client(name)
        purchase = _PendingPurchase(amount)
        renewal: asyncio.Task[None] | None = None
        try:
            async with client.turn:
                poll_s = MIN_POLL_S
                while not await self._fits(client, name, limit, purchase):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(poll_s if purchase.polls else None):
                            await client.is_released.wait()
                    poll_s = min(2 * poll_s, MAX_POLL_S)
                client.purchases += 1
                client.reserved += amount
            if self._shared is not None:
                renewal = asyncio.create_task(self._renew(self._shared, name, limit, purchase))
            try:
                yield client.note
            finally:
                client.purchases -= 1
                client.reserved -= amount
                client.is_released.set()
        finally:
            if renewal is not None:
                renewal.cancel()
            if self._shared is not None:
                client.note_end(purchase)
                task = asyncio.create_task(self._end(self._shared, name, limit))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _fits(
        self,
        client: "_ClientSpending",
        name: str,
        limit: SpendingLimit,
        purchase: "_PendingPurchase",
    ) -> bool:
        # Taken before the sums are read: what ends meanwhile counts twice then, and never not.
        client.is_released.clear()
        is_alone, reserved = not client.purchases, client.reserved
        billed = await self._billed_here(name, limit)
        purchase.polls = False
        if self._shared is not None:
            if billed.at_most >= limit.nanodollars:
                raise _exceeded(limit)
            purchase.first_day = billed.first_day
            answer = await self._shared.reserve(
                *(name, billed.first_day),
                here=billed.at_least,
                # What is not certain is not told: it only leaves less of the budget.
                limit=limit.nanodollars - (billed.at_most - billed.at_least),
                amount=purchase.amount,
                purchase=purchase.id,
            )
            # Others may be what it waits for; or the server may be back soon.
            purchase.polls = True
            if answer is not None:
                client.hear(answer, billed)
                if answer.decision is Decision.EXCEEDED:
                    raise _exceeded(limit)
                return answer.decision is Decision.RESERVED
        here = billed.at_most
        left: float = limit.nanodollars - here - client.others
        if self._shared is not None and left > 0:
            # What was left when the others were asked last is divided among all nodes.
            told = client.told = min(here, here if client.told is None else client.told)
            left = (left + here - told) / self._count_nodes() - (here - told)
        if left <= 0:
            raise _exceeded(limit)
        share = left / self._workers
        return is_alone or (purchase.amount > 0 and reserved + purchase.amount <= share)

    async def _renew(
        self, shared: SharedSpending, name: str, limit: SpendingLimit, purchase: "_PendingPurchase"
    ) -> None:
        """Keep what is reserved for as long as a purchase lasts."""
        while True:
            await asyncio.sleep(LEASE_S / 3)
            billed = await self._billed_here(name, limit)
            purchase.first_day = billed.first_day
            await shared.renew(
                *(name, billed.first_day),
                here=billed.at_least,
                amount=purchase.amount,
                purchase=purchase.id,
            )

    async def _end(self, shared: SharedSpending, name: str, limit: SpendingLimit) -> None:
        """Tell the other nodes what was charged, and that it is all."""
        await self._settle(shared, name, await self._billed_here(name, limit))

    async def _settle(self, shared: SharedSpending, name: str, billed: "_Billed") -> bool:
        """Tell what was billed, and which purchases have ended; return whether it was told."""
        answer = await shared.settle(
            *(name, billed.first_day),
            here=billed.at_least,
            ended=[purchase for _, purchase in billed.ended],
        )
        if answer is None:
            return False
        client = self._clients.get(name)
        if client is not None:
            client.ended -= billed.ended
            client.hear(answer, billed)
        return True

    def _client(self, name: str) -> "_ClientSpending":
        return self._clients.setdefault(name, _ClientSpending())


class _Billed(NamedTuple):
    """What this node has billed a client in a period, in nanodollars."""

    first_day: int
    """Of the period, in days since 1970."""
    at_least: int
    at_most: int
    """More than `at_least` only while the ledger cannot be written or read."""
    ended: frozenset[tuple[int, str]] = frozenset()
    """Purchases that had ended before the sum was read, so it has their charges; see
    `_ClientSpending.ended`."""


class _ClientSpending:
    """One client's purchases in this process."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        """Held by the purchase that is to begin next."""
        self.is_released = asyncio.Event()
        self.purchases = 0
        """Those under way."""
        self.reserved = 0
        """Nanodollars that they may cost."""
        self.reading = asyncio.Lock()
        """Held while the ledger is read."""
        self.asked = self.answered = 0
        """How often its sum was asked for, and how many of these `billed` answers."""
        self.billed = _Billed(0, 0, 0)
        """What was found last."""
        self.known = 0
        """Nanodollars in the ledger when it was read last."""
        self.charged = self.charged_before = self.charged_after = 0
        """Those that were charged in this process: so far, before that reading, and after it."""
        self.others = 0
        """Nanodollars that other nodes had billed in the period when they were asked last."""
        self.told: int | None = None
        """Nanodollars that this node had billed then; None if they were never asked."""
        self.ended: set[tuple[int, str]] = set()
        """Purchases whose end the other nodes were not told yet, with the first day of the period
        in which they have a reservation."""

    def note(self, bill: Bill) -> None:
        """Count a charge."""
        self.charged += sum(bill.nanodollars)

    def note_end(self, purchase: "_PendingPurchase") -> None:
        """Note the end of a purchase, for the other nodes."""
        if purchase.first_day is not None:
            if len(self.ended) >= MAX_ENDED:
                # By the time that they are told, most reservations have lapsed.
                self.ended.clear()
            self.ended.add((purchase.first_day, purchase.id))

    def ended_in(self, first_day: int) -> frozenset[tuple[int, str]]:
        """Return those of `ended` whose reservation is in the period that began on a day."""
        return frozenset(end for end in self.ended if end[0] == first_day)

    def begin(self, first_day: int) -> None:
        """Begin a period. Nobody asks for reservations in the last one any more; they lapse."""
        self.ended = set(self.ended_in(first_day))
        self.billed = _Billed(first_day, 0, 0)
        self.known, self.charged_before, self.charged_after = 0, self.charged, self.charged
        self.others, self.told = 0, None

    def hear(self, answer: SpendingAnswer, billed: _Billed) -> None:
        """Note what other nodes have billed, when they were told what this one has."""
        if billed.first_day == self.billed.first_day:
            self.others, self.told = answer.others, billed.at_least


class _PendingPurchase:
    """One that is to be made, or is under way."""

    def __init__(self, amount: int) -> None:
        self.id = secrets.token_hex(8)
        self.amount = amount
        self.first_day: int | None = None
        """Of the period in which it has a reservation, or may have."""
        self.polls = False
        """Whether what it waits for may end without a word in this process."""


def _exceeded(limit: SpendingLimit) -> BudgetExceeded:
    return BudgetExceeded(
        f"You exceeded the budget of this key, {limit.nanodollars / NANO:g} USD"
        f" {_PERIODS[limit.period]}. What is cached is still served; ask the operator for a"
        " larger budget."
    )


class BudgetCheck:
    """An Embedder that buys from another one within the budget of the client, if it has any."""

    def __init__(
        self, inner: Embedder, budgets: Budgets, prices: Sequence[float | None] = ()
    ) -> None:
        """`prices` are those of the routes, in US dollars a million tokens; None = the model's."""
        self._inner = inner
        self._budgets = budgets
        self._max_price = max((price for price in prices if price is not None), default=0.0)

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return the answer of the wrapped embedder. Raises BudgetExceeded, EmbeddingError."""
        account, on_charge = context.account, context.on_charge
        if account.limit is None:
            return await self._inner.embed(space, inputs, context)
        # Without a list price nobody knows what a route without one of its own costs.
        price = max(account.price, self._max_price) if account.price else 0.0
        amount = nanodollars(sum(map(tokens.bound, inputs)), price)
        async with self._budgets.purchase(account.client, account.limit, amount) as note:

            def charge(bill: Bill) -> None:
                # First into the ledger: what it counts is never missing here.
                if on_charge is not None:
                    on_charge(bill)
                note(bill)

            return await self._inner.embed(space, inputs, replace(context, on_charge=charge))

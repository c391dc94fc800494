"""Holds clients to their budgets: what a client's name was billed in a period bounds what it buys.

The ledger on disk has the sums of all processes. It is read before each purchase, after what this
process has counted was written. A purchase reserves the most that it may cost at the highest list
price of the model and its routes. It begins if this process buys nothing else for the client, or if
all that is reserved still fits into the process's share of what is left. So a budget is passed by
the last purchase of each worker at most, however many requests come at the same time; a purchase
that does not fit waits for the others to end. What an upstream charges above its list price is not
reserved.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.errors import BudgetExceeded
from embedding_proxy.cache.ledger import LedgerFilter
from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Context, Embedded, Embedder, Input, Space
from embedding_proxy.providers.charge import NANO, Bill, SpendingLimit, nanodollars

_PERIODS = {"day": "of this day (UTC)", "month": "of this month (UTC)", "ever": "in all"}


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

    async def billed(self, name: str, limit: SpendingLimit) -> int:
        """Return the nanodollars that a client was billed in the present period.

        While the ledger cannot be written or read, it is what is known in this process.
        """
        client = self._client(name)
        first_day = limit.first_day(self._clock())
        if client.first_day != first_day:
            client.first_day, client.known, client.charged = first_day, 0, 0
        counted = client.charged
        if await self._store.flush_counts():
            lines = await self._store.ledger([], lines=LedgerFilter(name, first_day))
            if lines is not None and client.first_day == first_day:
                client.known = sum(usage.nanodollars_billed for _, usage in lines)
                client.charged -= counted
                return client.known
        return client.known + client.charged

    @asynccontextmanager
    async def purchase(
        self, name: str, limit: SpendingLimit, amount: int
    ) -> AsyncIterator[Callable[[Bill], None]]:
        """Let the block buy on a client's account, and give what is told its charges.

        `amount` is the most that it may cost, in nanodollars; 0 = that is not known, and the client
        buys nothing else meanwhile. Waits until there is room. Raises BudgetExceeded.
        """
        client = self._client(name)
        async with client.turn:
            while not await self._fits(client, name, limit, amount):
                await client.is_released.wait()
            client.purchases += 1
            client.reserved += amount
        try:
            yield client.note
        finally:
            client.purchases -= 1
            client.reserved -= amount
            client.is_released.set()

    async def _fits(
        self, client: "_ClientSpending", name: str, limit: SpendingLimit, amount: int
    ) -> bool:
        # Taken before the sums are read: what ends meanwhile counts twice then, and never not.
        client.is_released.clear()
        is_alone, reserved = not client.purchases, client.reserved
        billed = await self.billed(name, limit)
        if billed >= limit.nanodollars:
            raise BudgetExceeded(
                f"You exceeded the budget of this key, {limit.nanodollars / NANO:g} USD"
                f" {_PERIODS[limit.period]}. What is cached is still served; ask the operator for a"
                " larger budget."
            )
        share = (limit.nanodollars - billed) / self._workers
        return is_alone or (amount > 0 and reserved + amount <= share)

    def _client(self, name: str) -> "_ClientSpending":
        return self._clients.setdefault(name, _ClientSpending())


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
        self.first_day = 0
        """The period of the two sums below, in days since 1970."""
        self.known = 0
        """Nanodollars in the ledger when it was read last."""
        self.charged = 0
        """Those that were charged since then, or a few more."""

    def note(self, bill: Bill) -> None:
        """Count a charge."""
        self.charged += sum(bill.nanodollars)


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

"""An Embedder that wraps another and never pays twice: look up, join, fill, reassemble in order.

It counts each input exactly once: `inputs = duplicates + hits + joins + misses`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from providers.base import (
    Account,
    Context,
    DeadlineExceeded,
    Embedded,
    Embedder,
    EmbeddingError,
    Input,
    InputRefused,
    OnCharge,
    Outcome,
    Space,
    Terms,
    Vector,
)

from . import at_hand, flight
from .assembly import Filled, Found, assemble
from .flight import Fill, Flights
from .key import Key, Keyring, Namespace, keyring
from .ledger import Answered, Heading, Purchase
from .record import Entry
from .refusal import KeyRefused, NotCached, is_the_leaders_own, named
from .row import Partition
from .tiers import Tiers


class CachingEmbedder:
    """The cache around an embedder. Tiers and flights are shared by the embedders of all models."""

    def __init__(self, inner: Embedder, tiers: Tiers, flights: Flights[Filled]) -> None:
        self._inner = inner
        self._tiers = tiers
        self._flights = flights

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Answered:
        """Return a vector for each input, asking the wrapped embedder only for unknown ones.

        What was asked is on disk when this returns; when it raises EmbeddingError, so is what was
        bought before the failure. The index of a refused input is its first place in `inputs`.
        `context.terms` says what counts as known, whether a trace may stay, and if not even unknown
        ones are bought: then NotCached is raised at once, whatever others are buying just now.
        """
        ring = keyring(space, Namespace(context.namespace))
        keys = await ring.keys(inputs)
        # By far the most requests: all is known, and nothing stands in them twice.
        first = await at_hand.first(self._tiers, ring, keys, context.terms)
        if len(first) == len(keys):
            known_all = at_hand.answered(self._tiers, ring, keys, first, context.account)
            if context.weigh is not None:
                await context.weigh(known_all.tokens)
            if known_all.again is not None:
                known_all.again.count()
            return known_all
        distinct = dict(zip(keys, inputs, strict=True))
        landed = self._flights.landed
        found = dict(zip(keys, first, strict=False))
        # Of a space whose width is not known, nothing can be read; what is bought tells it.
        rest = [key for key in distinct if key not in found] if space.dimensions else []
        found |= await self._tiers.get_many(rest, ring.partition, context.terms)
        fills: list[Filled] = []
        answers = {key: Found(entry, Outcome.HIT) for key, entry in found.items()}
        missing = {key: item for key, item in distinct.items() if key not in found}
        if context.weigh is not None:
            tokens = None if missing else [found[key].tokens for key in keys]
            context = replace(context, counts=await context.weigh(tokens), weigh=None)
        if missing:
            if not context.terms.spend:
                places = [place for place, key in enumerate(keys) if key in missing]
                raise NotCached(context.terms, places, len(inputs))
            try:
                async with asyncio.timeout_at(context.deadline):
                    bought, fills = await self._obtain(ring, missing, context, landed)
            except KeyRefused as error:
                raise named(error.refusal, keys.index(error.key), len(inputs)) from error
            except TimeoutError as error:
                raise DeadlineExceeded("the time of the request was up") from error
            answers.update(bought)
        answer = assemble(keys, answers, fills, context.account)
        partition, account = _partition(ring, answer.vectors[0]), context.account
        heading = Heading(partition, account.model, client=account.client)
        self._tiers.count(heading, answer.usage.unpaid)
        return answer

    def at_hand(
        self,
        space: Space,
        inputs: Sequence[Input],
        namespace: str,
        terms: Terms,
        account: Account,
    ) -> Answered | None:
        """Return the answer to a few inputs, no two of them equal, if it is at hand; else None.

        It is not counted yet: its `again` does that. Raises InputRefused.
        """
        ring = keyring(space, Namespace(namespace))
        return at_hand.few(self._tiers, ring, ring.keys_at_once(inputs), terms, account)

    def on_charge(self, space: Space, context: Context) -> OnCharge:
        """Return what counts the bills of calls that are made without the cache."""
        partition = keyring(space, Namespace(context.namespace)).partition
        return Purchase(self._tiers.count, partition, context.account).charge

    async def _obtain(
        self, ring: Keyring, missing: Mapping[Key, Input], context: Context, landed: int
    ) -> tuple[dict[Key, Found], list[Filled]]:
        """Get what no tier had: wait for fills in progress, start one for the rest.

        Also returns the fills that were this request's own.
        """
        joins, leads = self._flights.part(list(missing), context.terms)
        own: Fill[Filled] | None = None
        if leads:
            # Between the look-up and here another fill may have ended, and have bought some of
            # these: then it is neither among the fills nor among what was found. Look again.
            look_again = landed != self._flights.landed
            items = {key: missing[key] for key in leads}
            own = self._flights.lead(
                leads,
                lambda fill: self._fill(fill, ring, items, context, look_again=look_again),
                context.deadline,
                context.terms,
                context.credential,
            )
        await flight.wait([own] if own else [], joins)

        answers: dict[Key, Found] = {}
        fills: list[Filled] = []
        if own is not None:
            filled = own.task.result()
            fills.append(filled)
            for key in leads:
                outcome = Outcome.MISS if key in filled.bought else Outcome.HIT
                answers[key] = Found(own.there[key], outcome)
        again: dict[Key, Input] = {}
        for key, fill in joins.items():
            try:
                # What it handed out before it failed is as good as any.
                if key not in fill.there:
                    fill.task.result()
                answers[key] = Found(fill.there[key], Outcome.JOIN)
            except EmbeddingError as error:
                if not is_the_leaders_own(error, fill, missing, context.credential):
                    raise
                again[key] = missing[key]
        if again:
            more, further = await self._obtain(ring, again, context, landed)
            answers.update(more)
            fills += further
        return answers, fills

    async def _fill(
        self,
        fill: Fill[Filled],
        ring: Keyring,
        items: Mapping[Key, Input],
        context: Context,
        *,
        look_again: bool,
    ) -> Filled:
        """Ask, store, hand out, each part as it comes. A failure keeps the parts before it."""
        keys = list(items)
        found: dict[Key, Entry] = {}
        if look_again and ring.space.dimensions:
            found = await self._tiers.get_many(keys, ring.partition, context.terms)
        if found:
            self._flights.give(fill, found)
        wanted = [key for key in keys if key not in found]
        bought: set[Key] = set()
        puts: list[asyncio.Task[None]] = []
        purchase = Purchase(self._tiers.count, ring.partition, context.account)

        async def put(entries: Mapping[Key, Entry]) -> None:
            partition = _partition(ring, next(iter(entries.values())).vector)
            await self._tiers.put_many(entries, partition, context.terms)
            self._flights.give(fill, entries)

        async def keep(places: Sequence[int], part: Embedded) -> None:
            rows = zip(places, part.vectors, part.tokens, strict=True)
            new = [row for row in rows if wanted[row[0]] not in bought]
            if not new:
                return
            entries = {
                (key := wanted[place]): Entry(vector, tokens, part.counted, key.digest)
                for place, vector, tokens in new
            }
            bought.update(entries)
            purchase.bought([place for place, *_ in new], len(part.vectors[0]) // 4)
            # Who brings it may be called off while it is written; it is bought all the same.
            puts.append(asyncio.create_task(put(entries)))
            await asyncio.shield(puts[-1])

        if not wanted:
            return Filled(frozenset())
        inputs = [items[key] for key in wanted]
        try:
            told = replace(context, on_part=keep, on_charge=purchase.charge)
            embedded = await self._inner.embed(ring.space, inputs, told)
            if len(bought) < len(wanted):
                await keep(range(len(wanted)), embedded)
        except InputRefused as error:
            if error.index is None:
                raise
            raise KeyRefused(error, wanted[error.index]) from error
        finally:
            purchase.close()
            await asyncio.gather(*puts)
        return Filled(frozenset(bought), embedded.providers, purchase.charged)


def _partition(ring: Keyring, vector: Vector) -> Partition:
    """Return where entries belong; the width is the vector's where the space has none yet."""
    return ring.partition._replace(dimensions=ring.partition.dimensions or len(vector) // 4)

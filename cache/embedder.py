"""An Embedder that wraps another and never pays twice: look up, join, fill, reassemble in order.

It counts each input exactly once: `inputs = duplicates + hits + joins + misses`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from providers.base import (
    Account,
    Bill,
    Context,
    DeadlineExceeded,
    Embedder,
    EmbeddingError,
    Input,
    OnCharge,
    Outcome,
    Space,
    Terms,
)

from . import at_hand, flight, slicing
from .assembly import Filled, Found, assemble
from .flight import Fill, Flights
from .key import Key, Keyring, Keys, Namespace, keyring
from .ledger import Answered, Heading, Purchase
from .record import Entry
from .recorder import OnWidth, Recorder, ignore_width, partition
from .refusal import KeyFailed, NotCached, is_the_leaders_own, named
from .tiers import Tiers

MAX_ROUNDS_WITH_STRANGERS = 3
"""Times that a request waits for purchases of clients with other keys, which may be refused; then
it buys for itself. Else many clients with bad keys would fail one after the other."""


class CachingEmbedder:
    """The cache around an embedder. Tiers and flights are shared by the embedders of all models."""

    def __init__(
        self,
        inner: Embedder,
        tiers: Tiers,
        flights: Flights[Filled],
        on_width: OnWidth = ignore_width,
    ) -> None:
        """`on_width` is told the width of a space that has none when its first vector arrives.

        It is told before the vector is kept, and though nobody may wait for it any more.
        """
        self._inner = inner
        self._on_width = on_width
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
        if len(keys) > slicing.MAX_INPUTS and context.weigh is None:
            return await self._embed_slices(ring, keys, inputs, context)
        return await self._embed(ring, keys, inputs, context, [])

    async def _embed_slices(
        self, ring: Keyring, keys: Keys, inputs: Sequence[Input], context: Context
    ) -> Answered:
        """Answer a request that is too large to be looked at as a whole in one step."""

        async def ask(some: Keys, items: Sequence[Input], fills: slicing.Fills) -> Answered:
            return await self._embed(ring, some, items, context, fills)

        account, deadline = context.account, context.deadline
        sliced = await slicing.answer_in_slices(ask, keys, inputs, account, deadline)
        answer = replace(sliced.answer, keys=keys)
        heading = self._heading(ring, answer, account)
        self._tiers.count(heading, sliced.duplicates)
        if not sliced.is_repeatable:
            return answer
        again = at_hand.repeat(self._tiers, ring, keys, answer.usage, account)
        return replace(answer, again=again)

    async def _embed(
        self,
        ring: Keyring,
        keys: Keys,
        inputs: Sequence[Input],
        context: Context,
        own: slicing.Fills,
    ) -> Answered:
        """Answer a request, or a slice of one. The fills that it starts are added to `own`."""
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
        rest = [key for key in distinct if key not in found] if ring.space.dimensions else []
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
                    bought, fills = await self._obtain(ring, missing, context, landed, own)
            except KeyFailed as error:
                raise named(error.failure, keys.index(error.key), len(inputs)) from error
            except TimeoutError as error:
                raise DeadlineExceeded("the time of the request was up") from error
            answers.update(bought)
        answer = assemble(keys, answers, fills, context.account)
        heading = self._heading(ring, answer, context.account)
        self._tiers.count(heading, answer.usage.unpaid)
        return answer

    @staticmethod
    def _heading(ring: Keyring, answer: Answered, account: Account) -> Heading:
        """Return under what the sums of an answer stand that was not bought."""
        place = partition(ring, answer.vectors[0])
        return Heading(place, account.model, client=account.client)

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
        """Return what counts, and writes, the bills of calls that are made without the cache."""
        ring = keyring(space, Namespace(context.namespace))
        purchase = Purchase(self._tiers.count, ring.partition, context.account)

        def charge(bill: Bill) -> None:
            purchase.charge(bill)
            purchase.close()
            self._flights.write(self._tiers.flush_counts())

        return charge

    async def _obtain(
        self,
        ring: Keyring,
        missing: Mapping[Key, Input],
        context: Context,
        landed: int,
        started: slicing.Fills,
    ) -> tuple[dict[Key, Found], list[Filled]]:
        """Get what no tier had: wait for fills in progress, start one for the rest.

        What a fill fails with for a reason of its leader's own is asked for again. Also returns the
        fills that were this request's own.
        """
        answers: dict[Key, Found] = {}
        fills: list[Filled] = []
        rounds = 0
        while missing:
            joins, leads = self._flights.part(list(missing), context.terms)
            if rounds >= MAX_ROUNDS_WITH_STRANGERS:
                strange = [k for k, fill in joins.items() if fill.credential != context.credential]
                leads += strange
                for key in strange:
                    del joins[key]
            own = self._lead(ring, {key: missing[key] for key in leads}, context, landed)
            if own is not None:
                started.append(own)
            await flight.wait([own] if own else [], joins)
            if own is not None:
                filled = own.task.result()
                fills.append(filled)
                for key in leads:
                    outcome = Outcome.MISS if key in filled.bought else Outcome.HIT
                    answers[key] = Found(own.there[key], outcome)
            missing = _take_joined(joins, missing, context, answers)
            rounds += 1
        return answers, fills

    def _lead(
        self, ring: Keyring, items: Mapping[Key, Input], context: Context, landed: int
    ) -> Fill[Filled] | None:
        """Start a fill for what nobody buys so far, if there is any."""
        if not items:
            return None
        # Between the look-up and here another fill may have ended, and have bought some of these:
        # then it is neither among the fills nor among what was found. Look again.
        look_again = landed != self._flights.landed
        return self._flights.lead(
            list(items),
            lambda fill: self._fill(fill, ring, items, context, look_again=look_again),
            context.deadline,
            context.terms,
            context.credential,
        )

    async def _fill(
        self,
        fill: Fill[Filled],
        ring: Keyring,
        items: Mapping[Key, Input],
        context: Context,
        *,
        look_again: bool,
    ) -> Filled:
        """Ask, store, hand out, each part as it comes. A failure keeps the parts before it.

        When it ends, all that was charged is on disk, also where nothing is to be kept. A call that
        nobody waits for any more may bring its answer after the end: that is kept and billed, too.
        """
        keys = list(items)
        found: dict[Key, Entry] = {}
        if look_again and ring.space.dimensions:
            found = await self._tiers.get_many(keys, ring.partition, context.terms)
        if found:
            self._flights.give(fill, found)
        wanted = [key for key in keys if key not in found]
        if not wanted:
            return Filled(frozenset())
        recorder = Recorder(fill, self._flights, self._tiers, ring, wanted, context, self._on_width)
        inputs = [items[key] for key in wanted]
        try:
            told = replace(
                context,
                on_part=recorder.keep,
                on_charge=recorder.charge,
                on_begin=recorder.begin,
                abandoned=fill.abandonment,
            )
            embedded = await self._inner.embed(ring.space, inputs, told)
            if len(recorder.bought) < len(wanted):
                await recorder.keep(range(len(wanted)), embedded)
        except EmbeddingError as error:
            if error.index is None:
                raise
            raise KeyFailed(error, wanted[error.index]) from error
        finally:
            await recorder.close()
        return Filled(frozenset(recorder.bought), embedded.providers, recorder.charged)


def _take_joined(
    joins: Mapping[Key, Fill[Filled]],
    missing: Mapping[Key, Input],
    context: Context,
    answers: dict[Key, Found],
) -> dict[Key, Input]:
    """Add what has come of the fills that were joined; return what has to be asked for again.

    Raises EmbeddingError where the failure of a fill holds for this request, too.
    """
    again: dict[Key, Input] = {}
    failed: set[Fill[Filled]] = set()
    for key, fill in joins.items():
        # What it handed out before it failed is as good as any.
        entry = fill.there.get(key)
        if entry is None and fill not in failed:
            try:
                fill.task.result()
                entry = fill.there[key]
            except EmbeddingError as error:
                if not is_the_leaders_own(error, fill, missing, context.credential):
                    raise
                failed.add(fill)
        if entry is None:
            again[key] = missing[key]
        else:
            answers[key] = Found(entry, Outcome.JOIN)
    return again

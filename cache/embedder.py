"""An Embedder that wraps another and never pays twice: look up, join, fill, reassemble in order.

It counts each input exactly once: `inputs = duplicates + hits + joins + misses`.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from providers.base import (
    Context,
    DeadlineExceeded,
    Embedded,
    Embedder,
    EmbeddingError,
    Input,
    InputRefused,
    Outcome,
    Space,
    UpstreamTimeout,
)

from . import flight
from .flight import Fill, Flights
from .key import Key, Keyring, Namespace, keyring
from .record import Entry
from .tiers import Tiers
from .usage import Usage


class Filled(NamedTuple):
    """What a fill gives to everyone who waits for it."""

    entries: Mapping[Key, Entry]
    bought: frozenset[Key]
    """Keys that were asked from a provider; the others were found on the second look."""
    providers: tuple[str, ...]


class _Answer(NamedTuple):
    """An entry for one distinct input of a request, and how it came."""

    entry: Entry
    outcome: Outcome


class CachingEmbedder:
    """The cache around an embedder. Tiers and flights are shared by the embedders of all models."""

    def __init__(self, inner: Embedder, tiers: Tiers, flights: Flights[Filled]) -> None:
        self._inner = inner
        self._tiers = tiers
        self._flights = flights

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return a vector for each input, asking the wrapped embedder only for unknown ones.

        What was asked is on disk when this returns. Raises EmbeddingError.
        """
        ring = keyring(space, Namespace(context.namespace))
        keys = [ring.key(item) for item in inputs]
        distinct = dict(zip(keys, inputs, strict=True))
        landed = self._flights.landed
        found = await self._tiers.get_many(list(distinct), ring.partition)
        answers = {key: _Answer(entry, Outcome.HIT) for key, entry in found.items()}
        providers: tuple[str, ...] = ()
        if len(answers) < len(distinct):
            missing = {key: item for key, item in distinct.items() if key not in answers}
            try:
                async with asyncio.timeout_at(context.deadline):
                    bought, providers = await self._obtain(ring, missing, context, landed)
            except TimeoutError as error:
                raise DeadlineExceeded("the time of the request was up") from error
            answers.update(bought)
        answer = _assemble(keys, answers, providers)
        self._tiers.count(ring.partition, _not_bought(answer))
        return answer

    async def _obtain(
        self, ring: Keyring, missing: Mapping[Key, Input], context: Context, landed: int
    ) -> tuple[dict[Key, _Answer], tuple[str, ...]]:
        """Get what no tier had: wait for fills in progress, start one for the rest."""
        joins, leads = self._flights.part(list(missing))
        fills = set(joins.values())
        own: Fill[Filled] | None = None
        if leads:
            # Between the look-up and here another fill may have ended, and have bought some of
            # these: then it is neither among the fills nor among what was found. Look again.
            look_again = landed != self._flights.landed
            items = {key: missing[key] for key in leads}
            work = self._fill(ring, items, context, look_again=look_again)
            own = self._flights.lead(leads, work, context.deadline)
            fills.add(own)
        await flight.wait(fills)

        answers: dict[Key, _Answer] = {}
        providers: tuple[str, ...] = ()
        if own is not None:
            filled = own.task.result()
            providers = filled.providers
            for key in leads:
                outcome = Outcome.MISS if key in filled.bought else Outcome.HIT
                answers[key] = _Answer(filled.entries[key], outcome)
        again: dict[Key, Input] = {}
        for key, fill in joins.items():
            try:
                answers[key] = _Answer(fill.task.result().entries[key], Outcome.JOIN)
            except EmbeddingError as error:
                if not _is_the_leaders_own(error, fill, missing):
                    raise
                again[key] = missing[key]
        if again:
            more, their = await self._obtain(ring, again, context, landed)
            answers.update(more)
            providers += tuple(name for name in their if name not in providers)
        return answers, providers

    async def _fill(
        self, ring: Keyring, items: Mapping[Key, Input], context: Context, *, look_again: bool
    ) -> Filled:
        """Ask, store, hand out. A failure stores nothing and is everyone's who waits."""
        keys = list(items)
        found = await self._tiers.get_many(keys, ring.partition) if look_again else {}
        wanted = [key for key in keys if key not in found]
        if not wanted:
            return Filled(found, frozenset(), ())
        embedded = await self._inner.embed(ring.space, [items[key] for key in wanted], context)
        bought = {
            key: Entry(vector, tokens, embedded.counted, key.digest)
            for key, vector, tokens in zip(wanted, embedded.vectors, embedded.tokens, strict=True)
        }
        await self._tiers.put_many(bought, ring.partition)
        return Filled({**found, **bought}, frozenset(bought), embedded.providers)


def _not_bought(answer: Embedded) -> Usage:
    """Return the sums of what an answer did not buy; purchases are summed where they are kept."""
    counts = Counter(answer.outcomes)
    return Usage(
        hits=counts[Outcome.HIT],
        joins=counts[Outcome.JOIN],
        duplicates=counts[Outcome.DUPLICATE],
        tokens_saved=sum(answer.tokens) - answer.tokens_billed,
    )


def _is_the_leaders_own(error: EmbeddingError, fill: Fill[Filled], wanted: Collection[Key]) -> bool:
    """Tell whether a fill failed for a reason that need not hold for one who joined it.

    What was refused may be another's input that was bought along; or the leader's time was up.
    """
    if isinstance(error, InputRefused):
        return not fill.keys <= set(wanted)
    if isinstance(error, DeadlineExceeded | UpstreamTimeout):
        now = asyncio.get_running_loop().time()
        return fill.deadline is not None and fill.deadline <= now
    return False


def _assemble(
    keys: Sequence[Key], answers: Mapping[Key, _Answer], providers: tuple[str, ...]
) -> Embedded:
    """Put the answers into the order of the inputs; the first of equal inputs carries the cost."""
    seen: set[Key] = set()
    outcomes: list[Outcome] = []
    for key in keys:
        outcomes.append(Outcome.DUPLICATE if key in seen else answers[key].outcome)
        seen.add(key)
    entries = [answers[key].entry for key in keys]
    return Embedded(
        vectors=[entry.vector for entry in entries],
        tokens=[entry.tokens for entry in entries],
        counted=all(entry.counted for entry in entries),
        providers=providers,
        outcomes=outcomes,
    )

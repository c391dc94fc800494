"""An Embedder that wraps another and never pays twice: look up, wait for others, buy the rest.

It counts each input exactly once: `inputs = duplicates + hits + joins + misses`. No step of the
event loop grows with the number of inputs in a request.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from embedding_proxy.providers.base import (
    NORMAL,
    SLICE,
    CachePolicy,
    Context,
    Embedder,
    Input,
    Outcome,
    Space,
    Vector,
    slices,
)
from embedding_proxy.providers.charge import Account, Bill, OnCharge, nanodollars
from embedding_proxy.providers.errors import DeadlineExceeded, EmbeddingError

from .cached_hit import CachedHit, CountedEmbeddings
from .errors import NotCached, name_input
from .in_flight import Fetch, InFlight, wait
from .key import Key, Keyring, Keys, Namespace, keyring
from .ledger import Usage, charge_usage, ledger_key
from .record import Entry
from .tiers import Lookup, Tiers

MAX_ROUNDS_WITH_STRANGERS = 3
"""Times that a request waits for purchases of clients with other keys, which may be refused; then
it buys for itself. Else many clients with bad keys would fail one after the other."""
MAX_FETCH = 2048
"""Missing inputs of a request that one fetch buys; more are bought by several."""
MAX_FETCHES = 8
"""Of these, how many are under way at a time: enough that no provider waits for inputs."""
_VECTOR, _TOKENS, _COUNTED = attrgetter("vector"), attrgetter("tokens"), attrgetter("counted")


@dataclass(slots=True)
class _Request:
    """The distinct inputs of a request, and what has come of them so far."""

    ring: Keyring
    all_keys: Keys
    """Those of all inputs, equal ones included."""
    keys: Keys
    inputs: Sequence[Input]
    context: Context
    entries: list[Entry | None]
    outcomes: list[Outcome]
    fetches: list[Fetch] = field(default_factory=list)
    """Those that it leads."""


class CachingEmbedder:
    """The cache around an embedder. Tiers and fetches are shared by the embedders of all models."""

    def __init__(self, inner: Embedder, tiers: Tiers, in_flight: InFlight) -> None:
        self._inner = inner
        self._tiers = tiers
        self._in_flight = in_flight

    async def embed(
        self,
        space: Space,
        inputs: Sequence[Input],
        context: Context,
        lookup: Lookup | None = None,
    ) -> CountedEmbeddings:
        """Return a vector for each input, asking the wrapped embedder only for unknown ones.

        What was asked is on disk when this returns; when it raises EmbeddingError, so is what was
        bought before the failure. The index of a refused input is its first place in `inputs`.
        `context.terms` says what counts as known, whether a trace may stay, and if not even unknown
        ones are bought: then NotCached is raised at once, whatever others are buying just now.
        `lookup` is what `lookup_nowait` gave for these inputs a moment ago.
        """
        ring = keyring(space, Namespace(context.namespace))
        positions: list[int] | None = None
        if lookup is None:
            all_keys = await ring.keys(inputs)
            keys, inputs, positions = await _distinct(all_keys, inputs)
            mark = self._in_flight.landed
            lookup = await self._tiers.lookup(keys, ring.partition, context.terms)
        else:
            all_keys, keys, mark = lookup.keys, lookup.keys, lookup.mark
            await self._tiers.finish(lookup, ring.partition, context.terms)
            if lookup.missing and context.begun is not None:
                # The look-up is older than this context; leases have to know how old.
                context = replace(context, begun=lookup.begun)
        if context.check_tokens is not None:
            tokens = None if lookup.missing else _tokens(lookup.entries, positions)
            context = replace(context, counts=await context.check_tokens(tokens), check_tokens=None)
        if not lookup.missing and positions is None and len(keys) <= MAX_FETCH:
            # By far the most requests.
            account, terms = context.account, context.terms
            answer = self.answer_hits(ring, lookup, account, terms, is_counted=True)
            self._tiers.count(ledger_key(ring.partition, context.account), answer.usage)
            return answer
        outcomes = [Outcome.HIT] * len(keys)
        request = _Request(ring, all_keys, keys, inputs, context, lookup.entries, outcomes)
        if lookup.missing:
            if not context.terms.spend:
                missing = await _all_indices(lookup.missing, positions)
                raise NotCached(context.terms, missing, len(all_keys))
            await self._obtain(request, lookup.missing, mark)
        return await self._answer(request, positions)

    def lookup_nowait(self, ring: Keyring, inputs: Sequence[Input]) -> Lookup | None:
        """Look a few inputs up as far as nothing has to be awaited; None if two of them are equal.

        It is not counted. For requests without a policy of their own. Raises InvalidRequest.
        """
        keys = ring.keys_at_once(inputs)
        if len(keys) > 1 and len(set(keys.digests)) < len(keys):
            return None
        mark, begun = self._in_flight.landed, asyncio.get_running_loop().time()
        lookup = self._tiers.lookup_nowait(keys, ring.partition, NORMAL)
        lookup.mark, lookup.begun = mark, begun
        return lookup

    def answer_hits(
        self,
        ring: Keyring,
        lookup: Lookup,
        account: Account,
        terms: CachePolicy = NORMAL,
        *,
        is_counted: bool = False,
    ) -> CountedEmbeddings:
        """Return the answer to inputs all of which were found. It is not counted.

        `is_counted`: whether the look-up is; else the answer's `cached_hit` counts both.
        """
        entries = lookup.entries
        tokens = list(map(_TOKENS, entries))
        saved = sum(tokens)
        worth = nanodollars(saved, account.price)
        usage = Usage(len(tokens), 0, 0, 0, saved, 0, worth)
        key = ledger_key(ring.partition, account)
        uncounted = None if is_counted else lookup
        again = CachedHit(self._tiers, lookup.keys, ring.partition, key, usage, uncounted)
        return CountedEmbeddings(
            vectors=list(map(_VECTOR, entries)),
            tokens=tokens,
            counted=all(map(_COUNTED, entries)),
            outcomes=[Outcome.HIT] * len(tokens),
            usage=usage,
            keys=lookup.keys,
            cached_hit=again if is_plain(terms) else None,
        )

    def on_charge(self, space: Space, context: Context) -> OnCharge:
        """Return what counts, and writes, the charges of calls that are made without the cache."""
        partition = keyring(space, Namespace(context.namespace)).partition

        def charge(bill: Bill) -> None:
            key = ledger_key(partition, context.account, bill.provider)
            self._tiers.count(key, charge_usage(bill))
            self._in_flight.write(self._tiers.flush_counts())

        return charge

    async def _obtain(self, request: _Request, missing: Sequence[int], mark: int) -> None:
        """Get what no tier had, at the indices of `missing`. Raises EmbeddingError.

        After a failure nothing further is begun. It is raised when the calls under way have ended,
        or at the deadline, so that what was bought before is on disk.
        """
        deadline = request.context.deadline
        try:
            async with asyncio.timeout_at(deadline):
                if len(missing) <= MAX_FETCH:
                    await self._obtain_lot(request, missing, mark)
                else:
                    await self._obtain_in_lots(request, missing, mark)
        except TimeoutError as error:
            raise DeadlineExceeded("the time of the request was up") from error
        except EmbeddingError:
            going_on = [fetch.task for fetch in request.fetches if not fetch.task.done()]
            left = None if deadline is None else deadline - asyncio.get_running_loop().time()
            if going_on and (left is None or left > 0):
                await asyncio.wait(going_on, timeout=left)
            raise

    async def _obtain_in_lots(self, request: _Request, missing: Sequence[int], mark: int) -> None:
        lots = iter([missing[start : start + SLICE] for start in range(0, len(missing), SLICE)])

        async def work() -> None:
            for lot in lots:
                await self._obtain_lot(request, lot, mark)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(work()) for _ in range(MAX_FETCHES)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in done:
            task.result()

    async def _obtain_lot(self, request: _Request, missing: Sequence[int], mark: int) -> None:
        """Wait for fetches in progress, start one for the rest.

        What a fetch fails with for a reason of its leader's own is asked for again.
        """
        context = request.context
        indices = {request.keys[index]: index for index in missing}
        rounds = 0
        while await self._look_again(request, indices, mark):
            # From here to the start of the fetch nothing is awaited.
            mark = self._in_flight.landed
            joins, leads = self._in_flight.split(indices, context)
            if rounds >= MAX_ROUNDS_WITH_STRANGERS:
                strange = [
                    key
                    for key, fetch in joins.items()
                    if fetch.context.credential != context.credential
                ]
                leads += strange
                for key in strange:
                    del joins[key]
            own = []
            if leads:
                inputs = {key: request.inputs[indices[key]] for key in leads}
                fetch = Fetch(
                    self._in_flight, self._tiers, self._inner, request.ring, inputs, context
                )
                self._in_flight.add(fetch)
                request.fetches.append(fetch)
                own.append(fetch)
            await wait(own, joins)
            for fetch in own:
                _raise_failure(request, fetch)
                for key in leads:
                    index = indices.pop(key)
                    request.entries[index] = fetch.entries[key]
                    is_bought = key not in fetch.coalesced
                    request.outcomes[index] = Outcome.MISS if is_bought else Outcome.JOIN
            _take_joined(request, indices, joins)
            rounds += 1

    async def _look_again(self, request: _Request, indices: dict[Key, int], mark: int) -> bool:
        """Look up once more what has landed since `mark`; return whether anything is missing.

        Between the look-up and here another fetch may have ended, and have bought some of these:
        then it is neither in flight nor among what was found. Memory has it, if it has room.
        """
        while landed := list(self._in_flight.landed_since(mark, indices)):
            mark = self._in_flight.landed
            partition, terms = request.ring.partition, request.context.terms
            lookup = await self._tiers.lookup(Keys.from_keys(landed), partition, terms)
            for key, entry in zip(landed, lookup.entries, strict=True):
                if entry is not None:
                    request.entries[indices.pop(key)] = entry
        return bool(indices)

    async def _answer(
        self, request: _Request, positions: Sequence[int] | None
    ) -> CountedEmbeddings:
        """Return the answer to all inputs, and count what of it was not bought."""
        entries, outcomes = request.entries, request.outcomes
        is_repeatable = positions is None and is_plain(request.context.terms)
        if positions is not None:
            entries, outcomes = await _expand(entries, outcomes, positions)
        vectors: list[Vector] = []
        tokens: list[int] = []
        is_counted, usage = True, Usage()
        for start in range(0, len(outcomes), SLICE):
            if start:
                await asyncio.sleep(0)
            some = _sum(entries[start : start + SLICE], outcomes[start : start + SLICE])
            vectors += some[0]
            tokens += some[1]
            is_counted = is_counted and some[2]
            usage = usage.plus(some[3])
        usage = _with_worth(usage, request.context.account)
        for fetch in request.fetches:
            usage = usage.plus(fetch.ledger.charged)
        partition = request.ring.partition
        key = ledger_key(partition, request.context.account)
        self._tiers.count(key, usage.unpaid)
        is_hit = is_repeatable and usage.hits == len(outcomes)
        again = CachedHit(self._tiers, request.all_keys, partition, key, usage) if is_hit else None
        names = dict.fromkeys(name for fetch in request.fetches for name in fetch.providers)
        return CountedEmbeddings(
            vectors=vectors,
            tokens=tokens,
            counted=is_counted,
            providers=tuple(names),
            outcomes=outcomes,
            usage=usage,
            keys=request.all_keys,
            cached_hit=again,
        )


def is_plain(terms: CachePolicy) -> bool:
    """Tell whether a request takes any entry, and may leave a trace."""
    return terms.write and terms.max_age == math.inf


def _tokens(entries: Sequence[Entry | None], positions: Sequence[int] | None) -> list[int]:
    """Return the tokens of all inputs of a request, every one of which has an entry."""
    tokens = [entry.tokens for entry in entries if entry is not None]
    return tokens if positions is None else [tokens[position] for position in positions]


async def _distinct(
    keys: Keys, inputs: Sequence[Input]
) -> tuple[Keys, Sequence[Input], list[int] | None]:
    """Return what differs, and for each input its index in that; None if nothing is there twice."""
    seen: set[bytes] = set()
    for start in range(0, len(keys), SLICE):
        if start:
            await asyncio.sleep(0)
        seen.update(keys.digests[start : start + SLICE])
    if len(seen) == len(keys):
        return keys, inputs, None
    known: dict[bytes, int] = {}
    firsts, distinct, positions = Keys([], []), list[Input](), list[int]()
    async for some in slices(range(len(keys))):
        for index in some:
            position = known.setdefault(keys.digests[index], len(distinct))
            positions.append(position)
            if position == len(distinct):
                firsts.addresses.append(keys.addresses[index])
                firsts.digests.append(keys.digests[index])
                distinct.append(inputs[index])
    return firsts, distinct, positions


async def _all_indices(missing: Sequence[int], positions: list[int] | None) -> Sequence[int]:
    """Return the indices in a request of distinct inputs, wherever they stand in it."""
    if positions is None:
        return missing
    wanted = set(missing)
    found: list[int] = []
    async for some in slices(range(len(positions))):
        found += [index for index in some if positions[index] in wanted]
    return found


async def _expand(
    entries: Sequence[Entry | None], outcomes: Sequence[Outcome], positions: Sequence[int]
) -> tuple[list[Entry | None], list[Outcome]]:
    """Return what has come of all inputs; the first of equal ones carries the cost."""
    all_entries: list[Entry | None] = []
    all_outcomes: list[Outcome] = []
    count = 0
    async for some in slices(positions):
        for position in some:
            is_first = position == count
            count += is_first
            all_entries.append(entries[position])
            all_outcomes.append(outcomes[position] if is_first else Outcome.DUPLICATE)
    return all_entries, all_outcomes


def _sum(
    entries: Sequence[Entry | None], outcomes: Sequence[Outcome]
) -> tuple[list[Vector], list[int], bool, Usage]:
    """Return the vectors and tokens of some entries, whether these are exact, and the counts."""
    tokens = list(map(_TOKENS, entries))
    misses = outcomes.count(Outcome.MISS)
    saved = sum(tokens)
    if misses:
        rows = zip(tokens, outcomes, strict=True)
        saved -= sum(number for number, outcome in rows if outcome is Outcome.MISS)
    usage = Usage(
        hits=outcomes.count(Outcome.HIT),
        joins=outcomes.count(Outcome.JOIN),
        misses=misses,
        duplicates=outcomes.count(Outcome.DUPLICATE),
        tokens_saved=saved,
    )
    return list(map(_VECTOR, entries)), tokens, all(map(_COUNTED, entries)), usage


def _with_worth(usage: Usage, account: Account) -> Usage:
    return usage._replace(nanodollars_saved=nanodollars(usage.tokens_saved, account.price))


def _raise_failure(request: _Request, fetch: Fetch) -> None:
    """Raise what a fetch has failed with, if it has, as it reads in this request."""
    try:
        fetch.task.result()
    except EmbeddingError as error:
        if fetch.failed_key is None:
            raise
        index = request.all_keys.digests.index(fetch.failed_key.digest)
        raise name_input(error, index, len(request.all_keys)) from error


def _take_joined(request: _Request, indices: dict[Key, int], joins: Mapping[Key, Fetch]) -> None:
    """Take what has come of the fetches that were joined; the rest has to be asked for again.

    Raises EmbeddingError where the failure of a fetch holds for this request, too.
    """
    wanted = set(indices)
    failed: set[Fetch] = set()
    for key, fetch in joins.items():
        # What it handed out before it failed is as good as any.
        entry = fetch.entries.get(key)
        if entry is None and fetch not in failed:
            error = fetch.task.exception()
            if isinstance(error, EmbeddingError) and fetch.is_leader_specific(
                error, wanted, request.context
            ):
                failed.add(fetch)
            else:
                _raise_failure(request, fetch)
                entry = fetch.entries[key]
        if entry is not None:
            index = indices.pop(key)
            request.entries[index] = entry
            request.outcomes[index] = Outcome.JOIN

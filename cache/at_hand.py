"""What is answered without waiting: by far the most requests, all known and nothing twice."""

import asyncio
from collections.abc import Sequence

from cache.disk.reader import FEW
from providers.base import Account, Outcome, Terms

from .cached_hit import CachedHit
from .key import Keyring, Keys
from .ledger import Answered, Heading, usage_of_hits
from .record import Entry
from .tiers import LOT, Tiers
from .usage import Usage


def few(tiers: Tiers, ring: Keyring, keys: Keys, terms: Terms, account: Account) -> Answered | None:
    """Return the answer to a few keys if their entries can be had at once; else None.

    It is not counted yet: its `again` does that.
    """
    entries = tiers.at_sight(keys, ring.partition, terms) if _are_plain(ring, keys) else None
    return None if entries is None else answered(tiers, ring, keys, entries, account)


async def first(tiers: Tiers, ring: Keyring, keys: Keys, terms: Terms) -> list[Entry]:
    """Return the entries of the first keys: of as many as can be had without waiting.

    Others get their turn. There are none of keys of which two are equal.
    """
    entries: list[Entry] = []
    if not _are_plain(ring, keys):
        return entries
    look, step = tiers.at_hand, LOT
    while len(entries) < len(keys):
        some = look(keys[len(entries) : len(entries) + step], ring.partition, terms)
        if some is not None:
            entries += some
            await asyncio.sleep(0)
        elif step > FEW:
            look, step = tiers.at_sight, FEW
        else:
            break
    return entries


def _are_plain(ring: Keyring, keys: Keys) -> bool:
    """Tell whether keys differ, and are of a space that can be looked up."""
    return bool(ring.space.dimensions) and len(set(keys.addresses)) == len(keys)


def answered(
    tiers: Tiers, ring: Keyring, keys: Keys, entries: Sequence[Entry], account: Account
) -> Answered:
    """Return the answer that these entries of keys are, all of them hits."""
    tokens = [entry.tokens for entry in entries]
    usage = usage_of_hits(tokens, account)
    return Answered(
        vectors=[entry.vector for entry in entries],
        tokens=tokens,
        counted=all(entry.counted for entry in entries),
        outcomes=[Outcome.HIT] * len(entries),
        usage=usage,
        keys=keys,
        again=repeat(tiers, ring, keys, usage, account),
    )


def repeat(tiers: Tiers, ring: Keyring, keys: Keys, usage: Usage, account: Account) -> CachedHit:
    """Return what gives the same answer again, which is all hits, and counts its usage."""
    heading = Heading(ring.partition, account.model, client=account.client)
    return CachedHit(tiers, keys, ring.partition, heading, usage)

"""What is answered without waiting: by far the most requests, all known and nothing twice."""

import asyncio
from collections.abc import Sequence

from providers.base import Account, Outcome, Terms

from .key import Keyring, Keys
from .ledger import Answered, Heading, usage_of_hits
from .record import Entry
from .repeat import Repeat
from .tiers import Tiers

# Entries that are found in one go; between two goes, others get their turn.
_AT_A_TIME = 256


def few(tiers: Tiers, ring: Keyring, keys: Keys, terms: Terms, account: Account) -> Answered | None:
    """Return the answer if a tier has all of it to give at once, and no two keys are equal.

    Else None. It is not counted yet: its `again` does that.
    """
    if not _are_plain(ring, keys):
        return None
    entries = tiers.at_hand(keys, ring.partition, terms)
    if entries is None:
        entries = tiers.at_sight(keys, ring.partition, terms)
    else:
        tiers.hit(len(entries))
    return None if entries is None else _answered(tiers, ring, keys, entries, account)


async def many(
    tiers: Tiers, ring: Keyring, keys: Keys, terms: Terms, account: Account
) -> Answered | None:
    """Return the answer to any number of keys if memory has all of it; others get their turn."""
    if not _are_plain(ring, keys):
        return None
    entries: list[Entry] = []
    for start in range(0, len(keys), _AT_A_TIME):
        if start:
            await asyncio.sleep(0)
        some = tiers.at_hand(keys[start : start + _AT_A_TIME], ring.partition, terms)
        if some is None:
            return None
        entries += some
    tiers.hit(len(entries))
    return _answered(tiers, ring, keys, entries, account)


def _are_plain(ring: Keyring, keys: Keys) -> bool:
    """Tell whether keys differ, and are of a space that can be looked up."""
    return bool(ring.space.dimensions) and len(set(keys.addresses)) == len(keys)


def _answered(
    tiers: Tiers, ring: Keyring, keys: Keys, entries: Sequence[Entry], account: Account
) -> Answered:
    tokens = [entry.tokens for entry in entries]
    usage = usage_of_hits(tokens, account)
    heading = Heading(ring.partition, account.model, client=account.client)
    return Answered(
        vectors=[entry.vector for entry in entries],
        tokens=tokens,
        counted=all(entry.counted for entry in entries),
        outcomes=[Outcome.HIT] * len(entries),
        usage=usage,
        keys=keys,
        again=Repeat(tiers, keys, ring.partition, heading, usage),
    )

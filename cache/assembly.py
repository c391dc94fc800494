"""From entries to an answer: in the order of the inputs, each counted once."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

from providers.base import Account, Outcome

from .key import Key
from .ledger import Answered, usage_of
from .record import Entry
from .usage import NOTHING, Usage


class Filled(NamedTuple):
    """What a fill tells its leader at its end; the entries it has handed out before."""

    bought: frozenset[Key]
    """Keys that were asked from a provider; the others were found on the second look."""
    providers: tuple[str, ...] = ()
    charged: Usage = NOTHING
    """What providers charged for it."""


class Found(NamedTuple):
    """An entry for one distinct input of a request, and how it came."""

    entry: Entry
    outcome: Outcome


def in_order(
    keys: Sequence[Key], answers: Mapping[Key, Found]
) -> tuple[list[Entry], list[Outcome]]:
    """Put answers into the order of the inputs; the first of equal inputs carries the cost."""
    seen: set[Key] = set()
    outcomes: list[Outcome] = []
    for key in keys:
        outcomes.append(Outcome.DUPLICATE if key in seen else answers[key].outcome)
        seen.add(key)
    return [answers[key].entry for key in keys], outcomes


def assemble(
    keys: Sequence[Key], answers: Mapping[Key, Found], fills: Sequence[Filled], account: Account
) -> Answered:
    """Return the answer to a request whose inputs have these keys."""
    entries, outcomes = in_order(keys, answers)
    tokens = [entry.tokens for entry in entries]
    charged = reduce(Usage.plus, (filled.charged for filled in fills), NOTHING)
    return Answered(
        vectors=[entry.vector for entry in entries],
        tokens=tokens,
        counted=all(entry.counted for entry in entries),
        providers=tuple(dict.fromkeys(name for filled in fills for name in filled.providers)),
        outcomes=outcomes,
        usage=usage_of(tokens, outcomes, charged, account),
        keys=keys,
    )

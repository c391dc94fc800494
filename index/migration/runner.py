"""How a collection gets the vectors of another model: copied, cut, or made anew.

Pure. `auto` decides by what is known of the two models; copying and cutting are then proved on
sampled texts, since what is known may be wrong.

Moves a collection to the vectors of another model, or of the same one from another provider.

The new collection is made beside the old one, which is only read: until `cutover` switches the
aliases, and after a `rollback`, everything is as it was. The order of events::

    begin     regime chosen; collection made like the old one, payload indexes first
    prove     where vectors are copied: sampled texts are embedded, and compared
    copy      the old points in the order of their ids, a checkpoint after each page that landed
    compare   whole passes over both, until one finds no difference: what changed meanwhile follows
    cutover   compared and verified once more, then the aliases switch at one moment; what reached
              the old collection meanwhile is carried

Whoever kills it at any moment runs it again, and it goes on. What was bought is in the cache, and
not bought again: only the answers that were on their way at that moment are lost.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum

from embedding_proxy.index.client import no_insert_only
from embedding_proxy.index.collection import Provenance
from embedding_proxy.index.collection_reader import Point
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Space

from . import qdrant
from .embedding import Model, RetryingEmbedder
from .qdrant import Old, Points
from .state import MigrationState, Phase, State
from .text_template import Rule


class Regime(StrEnum):
    """Where the new vectors come from."""

    AUTO = "auto"
    """Decided by `choose`."""
    REUSE = "reuse"
    """Copied: both models are one space, and of one width."""
    TRUNCATE = "truncate"
    """The first numbers of the old vectors, renormalised: one Matryoshka space, narrower."""
    REEMBED = "reembed"
    """From the texts, through the cache."""

    @property
    def copies(self) -> bool:
        """Whether nothing need be bought but the sample."""
        return self in (Regime.REUSE, Regime.TRUNCATE)


class RegimeRefused(ValueError):
    """The regime that was asked for would give wrong vectors; the message says why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The regime, never `auto`, and the reason in words."""

    regime: Regime
    why: str


def choose(
    asked: Regime, old: Space | None, old_width: int, new: Space, new_width: int
) -> Decision:
    """Return the regime for vectors of `old_width` numbers of the space `old` (None = unknown).

    Raises RegimeRefused if the one that is asked for cannot give right vectors.
    """
    found = _fitting(old, old_width, new, new_width)
    if asked in (Regime.AUTO, found.regime):
        return found
    if asked is Regime.REEMBED:
        return Decision(asked, f"asked for, although `{found.regime}` would do: {found.why}")
    raise RegimeRefused(f"--regime {asked}: {found.why}")


def _fitting(old: Space | None, old_width: int, new: Space, new_width: int) -> Decision:
    """Return the cheapest regime that is right."""
    if old is None:
        return Decision(
            Regime.REEMBED,
            "nothing says which model made the old vectors; if it is known, name it with --from",
        )
    if (old.name, old.parameters) != (new.name, new.parameters):
        return Decision(Regime.REEMBED, f"{old.label} and {new.label} are two vector spaces")
    if old_width == new_width:
        return Decision(Regime.REUSE, f"both are {new.label}, {new_width} numbers wide")
    if old_width < new_width:
        return Decision(
            Regime.REEMBED, f"the old vectors have {old_width} numbers, fewer than {new_width}"
        )
    if not new.matryoshka:
        return Decision(Regime.REEMBED, f"{new.label} is no Matryoshka model: it cannot be cut")
    return Decision(
        Regime.TRUNCATE,
        f"both are {new.label}, whose vectors may be cut from {old_width} to {new_width} numbers",
    )


log = logging.getLogger("embedding_proxy.migrate")

Progress = Callable[[str, float], AbstractContextManager[Callable[[float], None]]]
"""Begins to show work of a name and a total, and gives what is told how much is done."""


class MigrationRefused(Exception):
    """The migration cannot be done, or go on, in this way; the message says what can be done."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a migration goes, and how careful it is."""

    page: int = 128
    """Points that are read, and texts that are embedded, at a time."""
    ahead: int = 2
    """Pages that are embedded side by side; they are written in order. A kill may lose so many."""
    points_per_second: float | None = None
    """At most so many; None = as fast as it goes."""
    sample: int = 10
    """Texts that are embedded to prove that vectors may be copied, and to verify."""
    passes: int = 5
    """Whole comparisons at most, before the writers are taken to be too busy."""


DEFAULT = Pace()


@dataclass(slots=True)
class Wanted:
    """What the user asks for, for one collection."""

    collection: str
    rule: Rule
    regime: Regime = Regime.AUTO
    old_space: Space | None = None
    """Of the old vectors, where the user says it."""
    vector: str | None = None
    into: str | None = None
    """The name of the new collection; None = it is made of the old one's and the model's."""


@dataclass(slots=True)
class Migration:
    """The migration of one collection: what it is, and what all its steps need."""

    points: Points
    model: Model
    journal: MigrationState
    rule: Rule
    old: Old
    state: State
    pace: Pace
    progress: Progress
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    patient: RetryingEmbedder = field(init=False)

    def __post_init__(self) -> None:
        self.patient = RetryingEmbedder(self.model, self.sleep)

    @property
    def regime(self) -> Regime:
        """Where the new vectors come from."""
        return Regime(self.state.regime)

    def oddity(self, point: Point) -> str | None:
        """Say what is wrong with the old vector of a point; None if it is sound."""
        return oddity(point, self.old.width, self.model.dimensions)

    def save(self) -> None:
        """Keep what has been done so far."""
        counts = self.state.counts
        counts.bought, self.patient.bought = counts.bought + self.patient.bought, 0
        self.journal.save(self.state)


def oddity(point: Point, width: int, new_width: int) -> str | None:
    """Say what is wrong with a point's vector; None if it is sound, and so is its head."""
    if point.vector is None:
        return "there is no vector"
    try:
        vector.check(point.vector, width)
        vector.check_heads([point.vector], min(width, new_width))
    except vector.VectorError as error:
        return str(error)
    return None


def decide(old: Old, wanted: Wanted, model: Model) -> Decision:
    """Return the regime for a collection, and why. Raises MigrationRefused.

    Where neither the user nor the collection says whose vectors the old ones are, nothing is known.
    """
    space, found = wanted.old_space, old.provenance
    if space is not None and found is not None and found.space != space.label:
        raise MigrationRefused(
            f"{old.name} says that its vectors are of {found.space}, and --from is {space.label}"
        )
    if space is None and found is not None and found.space == model.space.label:
        space = model.space
    if space is None and found is not None:
        space = Space(found.space, found.dimensions)
    try:
        return choose(wanted.regime, space, old.width, model.space, model.dimensions)
    except ValueError as error:
        raise MigrationRefused(f"{old.name}: {error}") from error


def state_for(points: Points, old: Old, wanted: Wanted, model: Model) -> State:
    """Return the state of a migration that has not begun. Raises MigrationRefused."""
    decision = decide(old, wanted, model)
    return State(
        place=str(points.qdrant),
        collection=wanted.collection,
        source=old.name,
        target=wanted.into or qdrant.target_name(old.name, model.name, model.dimensions),
        vector=old.vector,
        model=model.asked,
        space=model.space.label,
        dimensions=model.dimensions,
        rule=wanted.rule.source,
        regime=decision.regime,
        why=decision.why,
    )


async def begin(migration: Migration) -> None:
    """Go on where the journal says, or begin. Raises MigrationRefused, QdrantFailure."""
    known = migration.journal.load()
    fresh = migration.state
    if known is not None and known.phase is not Phase.FINALIZED:
        if known.phase in (Phase.SWITCHING, Phase.SWITCHED):
            raise MigrationRefused(
                f"{known.collection} was migrated to {known.target}, and the cutover has begun:"
                " go on with `cutover`, `rollback` or `finalize`"
            )
        if known.fingerprint() != fresh.fingerprint():
            raise MigrationRefused(
                f"a migration of {known.collection} to {known.target} is under way ({known.model},"
                f" {known.dimensions} numbers, {known.regime}, text from {known.rule}); ask for"
                " that one to go on, or give --restart to begin anew with an empty collection"
            )
        migration.state = known
        if known.phase is Phase.ROLLED_BACK:
            known.phase = Phase.COPYING
    elif fresh.target == fresh.source:
        raise MigrationRefused(f"{fresh.source} cannot be migrated into itself; see --into")
    else:
        found = await qdrant.owner(migration.points, fresh.target)
        if found is not None and found[1]:
            raise MigrationRefused(
                f"there is a collection {fresh.target} of {found[1]:,} points already, which this"
                " migration did not make; name another one with --into"
            )
    lack = await no_insert_only(migration.points.qdrant)
    if lack is not None:
        log.warning("%s", lack)
    state = migration.state
    wanted = Provenance(state.space, state.dimensions, state.rule)
    # What is made from here on is ours: so the journal knows of it before.
    migration.save()
    await qdrant.make_beside(migration.points, migration.old, state.target, wanted)


async def restart(points: Points, journal: MigrationState) -> None:
    """Delete what an unfinished migration has made. Raises MigrationRefused, QdrantFailure."""
    known = journal.load()
    if known is None:
        return
    if known.phase in (Phase.SWITCHING, Phase.SWITCHED):
        raise MigrationRefused(f"{known.target} is in use: `rollback` first")
    if known.phase is not Phase.FINALIZED:
        await qdrant.delete(points, known.target)
    journal.forget()

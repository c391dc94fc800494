"""Moves a collection to the vectors of another model, or of the same one from another provider.

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

from embedding_proxy.index.collection_reader import Point
from embedding_proxy.index.migration.collections import Old
from embedding_proxy.index.migration.embed import Model, RetryingEmbedder
from embedding_proxy.index.migration.journal import MigrationState, Phase, State
from embedding_proxy.index.migration.points import Points
from embedding_proxy.index.migration.regime import Decision, Regime, choose
from embedding_proxy.index.migration.template import Rule
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Space

from .collection import Provenance
from .connection import no_insert_only
from .migration import collections

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
        target=wanted.into or collections.target_name(old.name, model.name, model.dimensions),
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
        found = await collections.owner(migration.points, fresh.target)
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
    await collections.make_beside(migration.points, migration.old, state.target, wanted)


async def restart(points: Points, journal: MigrationState) -> None:
    """Delete what an unfinished migration has made. Raises MigrationRefused, QdrantFailure."""
    known = journal.load()
    if known is None:
        return
    if known.phase in (Phase.SWITCHING, Phase.SWITCHED):
        raise MigrationRefused(f"{known.target} is in use: `rollback` first")
    if known.phase is not Phase.FINALIZED:
        await collections.delete(points, known.target)
    journal.forget()

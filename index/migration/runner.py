"""A migration: moves a collection to the vectors of another model, or of the same from elsewhere.

The new collection is made beside the old one, which is only read: until `cutover` switches the
aliases, and after a `rollback`, everything is as it was. The order of events::

    begin     regime chosen; collection made like the old one, payload indexes first
    sample    where vectors are copied: sampled texts are embedded, and compared
    copy      the old points in the order of their ids, a checkpoint after each written page
    compare   whole passes over both, until one finds little: later changes follow
    cutover   compared and verified once more, then the aliases switch in one atomic step; changes
              that reached the old collection since that comparison are carried

A migration that was killed at any moment continues when it is run again. What was bought is in the
cache and not bought again; only answers that were on their way at that moment are lost.

This module chooses the regime (where the new vectors come from), keeps what all steps need, and
begins. `auto` decides by what is known of the two models; as that may be wrong, copies and cuts are
verified on sampled texts.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum

from embedding_proxy.index.client import no_insert_only
from embedding_proxy.index.collection import Provenance, origin_of
from embedding_proxy.index.collection_reader import Point
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.dimensions import check_heads

from . import qdrant
from .embedding import Model, RetryingEmbedder
from .points import Points
from .qdrant import SourceCollection
from .state import MigrationState, Phase, State
from .text_template import Payload, Rule, TemplateError, readings_of

log = logging.getLogger("embedding_proxy.migrate")


class Regime(StrEnum):
    """Where the new vectors come from."""

    AUTO = "auto"
    """Decided by `choose`."""
    REUSE = "reuse"
    """The old vectors: both models have the same space and width."""
    TRUNCATE = "truncate"
    """The first numbers of the old vectors, renormalised: a Matryoshka space, narrower."""
    REEMBED = "reembed"
    """Embeddings of the texts, through the cache."""

    @property
    def copies(self) -> bool:
        """Whether old vectors are used, so that only the sample is bought."""
        return self in (Regime.REUSE, Regime.TRUNCATE)


class RegimeRefused(ValueError):
    """The requested regime would give wrong vectors; the message says why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The regime, never `auto`, and the reason in words."""

    regime: Regime
    why: str


def choose(
    asked: Regime, old: Space | None, old_width: int, new: Space, new_width: int
) -> Decision:
    """Return the regime for vectors of `old_width` numbers of the space `old` (None = unknown).

    Raises RegimeRefused if the requested one cannot give right vectors.
    """
    found = _cheapest(old, old_width, new, new_width)
    if asked in (Regime.AUTO, found.regime):
        return found
    if asked is Regime.REEMBED:
        return Decision(asked, f"asked for, although `{found.regime}` would do: {found.why}")
    raise RegimeRefused(f"--regime {asked}: {found.why}")


def _cheapest(old: Space | None, old_width: int, new: Space, new_width: int) -> Decision:
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


Progress = Callable[[str, float], AbstractContextManager[Callable[[float], None]]]
"""Begins to show work of a name and a total; gives a function that takes the amount done."""


class MigrationRefused(Exception):
    """The migration cannot be done, or continue, in this way; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a migration goes, and how careful it is."""

    page: int = 128
    """Points in one read, and texts in one call."""
    ahead: int = 2
    """Pages that are embedded concurrently; they are written in order. A kill may lose so many."""
    points_per_second: float | None = None
    """At most so many; None = as fast as it goes."""
    sample: int = 10
    """Texts that are embedded to verify that vectors may be copied, and the result."""
    passes: int = 5
    """Whole comparisons at most; then the old collection changes too fast."""


DEFAULT = Pace()
DEFAULT_FIELD = "content"
"""The field of the text where nothing says which it is."""
MAX_NAMES = 40
OWN_FIELD = "text"
"""The field of the text in a collection of the proxy's own."""


@dataclass(slots=True)
class MigrationRequest:
    """The user's request for one collection."""

    collection: str
    rule: Rule | None = None
    """Where the texts are; None = where the collection, or a migration under way, says."""
    regime: Regime = Regime.AUTO
    old_space: Space | None = None
    """The space of the old vectors, if the user gives it."""
    vector: str | None = None
    into: str | None = None
    """The name of the new collection; None = it is derived from the old one's and the model's."""


@dataclass(slots=True)
class Migration:
    """The migration of one collection, with what all its steps need."""

    points: Points
    model: Model
    state_file: MigrationState
    rule: Rule
    old: SourceCollection
    state: State
    pace: Pace
    progress: Progress
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    embedder: RetryingEmbedder = field(init=False)

    def __post_init__(self) -> None:
        self.embedder = RetryingEmbedder(self.model, self.sleep)

    @property
    def regime(self) -> Regime:
        """Where the new vectors come from."""
        return Regime(self.state.regime)

    def vector_error(self, point: Point) -> str | None:
        """Say what is wrong with the old vector of a point; None if it is sound."""
        return vector_error(point, self.old.width, self.model.dimensions)

    def save(self) -> None:
        """Write the state to its file."""
        counts = self.state.counts
        counts.bought, self.embedder.bought = counts.bought + self.embedder.bought, 0
        self.state_file.save(self.state)


def vector_error(point: Point, width: int, new_width: int) -> str | None:
    """Say what is wrong with a point's vector; None if it is sound, and so is its head."""
    if point.vector is None:
        return "there is no vector"
    try:
        vector.check(point.vector, width)
        check_heads([point.vector], min(width, new_width))
    except vector.VectorError as error:
        return str(error)
    return None


def decide(old: SourceCollection, wanted: MigrationRequest, model: Model) -> Decision:
    """Return the regime for a collection, and why. Raises MigrationRefused.

    The old space is unknown if neither the user nor the collection names it.
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


async def resolve_rule(
    points: Points, old: SourceCollection, wanted: MigrationRequest, known: State | None = None
) -> Rule:
    """Return where the texts of a collection are. Raises MigrationRefused if no point has any.

    What the user says counts most, then what a migration under way says, then the collection
    itself: one of the proxy's own has them in `text`, if its metadata names no other template.
    """
    rule = wanted.rule
    try:
        if rule is None and known is not None and known.phase is not Phase.FINALIZED:
            rule = Rule.read(known.rule)
        elif rule is None and old.provenance is not None:
            own = old.provenance.text
            rule = Rule.field(OWN_FIELD) if own is None else Rule.read(own)
    except TemplateError as error:
        raise MigrationRefused(f"{old.name}: {error}; say where the texts are") from error
    rule = rule or Rule.field(DEFAULT_FIELD)
    first: list[Payload] = []
    fields: set[str] = set()
    number = 0
    async for page in points.pages(old.name, DEFAULT.page):
        payloads = [point.payload for point in page.points]
        if any(rule.text(payload) is not None for payload in payloads):
            return rule
        number += len(payloads)
        fields.update(*payloads)
        first = first or payloads
    if not number:
        return rule
    ready = readings_of(first)
    hint = f"; --text-by {ready[0]} reads them" if ready else ""
    raise MigrationRefused(
        f"none of {number:,} points of {old.name} has a text at {rule.source}; the fields there:"
        f" {join_names(fields)}{hint}; say where it is: --text-field, --template or --text-by"
    )


def join_names(fields: Collection[str]) -> str:
    """Return the names of fields for a message, the first MAX_NAMES of many."""
    names = sorted(fields)
    more = f", … ({len(names):,} in all)" if len(names) > MAX_NAMES else ""
    return (", ".join(names[:MAX_NAMES]) or "none") + more


def target_of(old: SourceCollection, wanted: MigrationRequest, model: Model) -> str:
    """Return the name of the new collection."""
    return wanted.into or qdrant.target_name(old.name, model.name, model.dimensions)


def state_for(
    points: Points, old: SourceCollection, wanted: MigrationRequest, rule: Rule, model: Model
) -> State:
    """Return the state of a migration that has not begun. Raises MigrationRefused."""
    decision = decide(old, wanted, model)
    space = None if old.provenance is None else old.provenance.space
    if space is None and wanted.old_space is not None:
        space = wanted.old_space.label
    return State(
        place=str(points.qdrant),
        collection=wanted.collection,
        source=old.name,
        target=target_of(old, wanted, model),
        vector=old.vector,
        model=model.asked,
        space=model.space.label,
        dimensions=model.dimensions,
        rule=rule.source,
        regime=decision.regime,
        why=decision.why,
        old_space=space,
        old_dimensions=old.width,
    )


async def begin(migration: Migration, *, dual_write: bool | None = None) -> None:
    """Continue from the saved state, or begin. Raises MigrationRefused, QdrantFailure.

    `dual_write` says whether the proxy is to write to both collections; None = as before.
    """
    known = migration.state_file.load()
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
        known.old_space, known.old_dimensions = fresh.old_space, fresh.old_dimensions
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
    if dual_write is not None:
        state.dual_write = dual_write
    _check_dual_write(migration)
    state.names = await qdrant.aliases_of(migration.points, state.source)
    origin = origin_of(migration.old.name, migration.old.provenance)
    wanted = Provenance(state.space, state.dimensions, state.rule, origin=origin)
    # The collection made next is ours: so the state is saved first.
    migration.save()
    await qdrant.make_target(migration.points, migration.old, state.target, wanted)


def _check_dual_write(migration: Migration) -> None:
    """Raise MigrationRefused if the proxy is to write to both collections, and cannot."""
    state = migration.state
    if state.dual_write and state.old_space is None:
        raise MigrationRefused(
            f"{state.source}: --dual-write has to know the model of the old vectors: --from"
        )


async def restart(points: Points, state_file: MigrationState) -> None:
    """Delete the collection of an unfinished migration. Raises MigrationRefused, QdrantFailure."""
    known = state_file.load()
    if known is None:
        return
    if known.phase in (Phase.SWITCHING, Phase.SWITCHED):
        raise MigrationRefused(f"{known.target} is in use: `rollback` first")
    if known.phase is not Phase.FINALIZED:
        await qdrant.delete(points, known.target)
    state_file.forget()

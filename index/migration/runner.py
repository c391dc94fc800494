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
    request: Regime, old: Space | None, old_width: int, new: Space, new_width: int
) -> Decision:
    """Return the regime for vectors of `old_width` numbers of the space `old` (None = unknown).

    Raises RegimeRefused if the requested one cannot give right vectors.
    """
    cheapest = _cheapest(old, old_width, new, new_width)
    if request in (Regime.AUTO, cheapest.regime):
        return cheapest
    if request is Regime.REEMBED:
        return Decision(
            request, f"asked for, although `{cheapest.regime}` would do: {cheapest.why}"
        )
    raise RegimeRefused(f"--regime {request}: {cheapest.why}")


def _cheapest(old: Space | None, old_width: int, new: Space, new_width: int) -> Decision:
    """Return the cheapest correct regime."""
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
    """The migration cannot begin or continue in this way; the message has the remedy."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The speed and the checks of a migration."""

    page: int = 128
    """Points in one read, and texts in one call."""
    ahead: int = 2
    """Pages that are embedded concurrently and written in order. A kill may lose as many."""
    points_per_second: float | None = None
    """The largest rate; None = no limit."""
    sample: int = 10
    """Texts that are embedded to verify a copy, and the result."""
    passes: int = 5
    """The most whole comparisons. If more are needed, the old collection changes too fast."""


DEFAULT = Pace()
DEFAULT_FIELD = "content"
"""The field of the text if nothing names another one."""
MAX_NAMES = 40
OWN_FIELD = "text"
"""The field of the text in a collection that the proxy has made."""


@dataclass(slots=True)
class MigrationRequest:
    """The user's request for one collection."""

    collection: str
    rule: Rule | None = None
    """The rule for the texts; None = that of the collection or of a migration in progress."""
    regime: Regime = Regime.AUTO
    old_space: Space | None = None
    """The space of the old vectors, if the user gives it."""
    vector: str | None = None
    into: str | None = None
    """The name of the new collection; None = derived from the old name and the model."""


@dataclass(slots=True)
class Migration:
    """The migration of one collection: the objects that its steps share."""

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
        """Return the fault of a point's old vector; None if it is sound."""
        return vector_error(point, self.old.width, self.model.dimensions)

    def save(self) -> None:
        """Write the state to its file."""
        counts = self.state.counts
        counts.bought, self.embedder.bought = counts.bought + self.embedder.bought, 0
        self.state_file.save(self.state)


def vector_error(point: Point, width: int, new_width: int) -> str | None:
    """Return the fault of a point's vector or of its head; None if both are sound."""
    if point.vector is None:
        return "there is no vector"
    try:
        vector.check(point.vector, width)
        check_heads([point.vector], min(width, new_width))
    except vector.VectorError as error:
        return str(error)
    return None


def decide(old: SourceCollection, request: MigrationRequest, model: Model) -> Decision:
    """Return the regime for a collection, and why. Raises MigrationRefused.

    The old space is unknown if neither the user nor the collection names it.
    """
    space, provenance = request.old_space, old.provenance
    if space is not None and provenance is not None and provenance.space != space.label:
        raise MigrationRefused(
            f"{old.name} says that its vectors are of {provenance.space}, and --from is"
            f" {space.label}"
        )
    if space is None and provenance is not None and provenance.space == model.space.label:
        space = model.space
    if space is None and provenance is not None:
        space = Space(provenance.space, provenance.dimensions)
    try:
        return choose(request.regime, space, old.width, model.space, model.dimensions)
    except ValueError as error:
        raise MigrationRefused(f"{old.name}: {error}") from error


async def resolve_rule(
    points: Points, old: SourceCollection, request: MigrationRequest, state: State | None = None
) -> Rule:
    """Return where the texts of a collection are. Raises MigrationRefused if no point has any.

    The user's request comes first, then a migration in progress, then the metadata of the
    collection. A collection of the proxy has its texts in `text` if they name no template.
    """
    rule = request.rule
    try:
        if rule is None and state is not None and state.phase is not Phase.FINALIZED:
            rule = Rule.read(state.rule)
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
    rest = f", … ({len(names):,} in all)" if len(names) > MAX_NAMES else ""
    return (", ".join(names[:MAX_NAMES]) or "none") + rest


def target_of(old: SourceCollection, request: MigrationRequest, model: Model) -> str:
    """Return the name of the new collection."""
    return request.into or qdrant.target_name(old.name, model.name, model.dimensions)


def state_for(
    points: Points, old: SourceCollection, request: MigrationRequest, rule: Rule, model: Model
) -> State:
    """Return the state of a migration that has not begun. Raises MigrationRefused."""
    decision = decide(old, request, model)
    space = None if old.provenance is None else old.provenance.space
    if space is None and request.old_space is not None:
        space = request.old_space.label
    return State(
        place=str(points.qdrant),
        collection=request.collection,
        source=old.name,
        target=target_of(old, request, model),
        vector=old.vector,
        model=model.requested_name,
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
    saved = migration.state_file.load()
    fresh = migration.state
    if saved is not None and saved.phase is not Phase.FINALIZED:
        if saved.phase in (Phase.SWITCHING, Phase.SWITCHED):
            raise MigrationRefused(
                f"{saved.collection} was migrated to {saved.target}, and the cutover has begun:"
                " go on with `cutover`, `rollback` or `finalize`"
            )
        if saved.fingerprint() != fresh.fingerprint():
            raise MigrationRefused(
                f"a migration of {saved.collection} to {saved.target} is under way ({saved.model},"
                f" {saved.dimensions} numbers, {saved.regime}, text from {saved.rule}); ask for"
                " that one to go on, or give --restart to begin anew with an empty collection"
            )
        migration.state = saved
        saved.old_space, saved.old_dimensions = fresh.old_space, fresh.old_dimensions
        if saved.phase is Phase.ROLLED_BACK:
            saved.phase = Phase.COPYING
    elif fresh.target == fresh.source:
        raise MigrationRefused(f"{fresh.source} cannot be migrated into itself; see --into")
    else:
        existing = await qdrant.owner(migration.points, fresh.target)
        if existing is not None and existing[1]:
            raise MigrationRefused(
                f"there is a collection {fresh.target} of {existing[1]:,} points already, which"
                " this migration did not make; name another one with --into"
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
    provenance = Provenance(state.space, state.dimensions, state.rule, origin=origin)
    # Saved first, so that the state shows that this migration made the collection.
    migration.save()
    await qdrant.make_target(migration.points, migration.old, state.target, provenance)


def _check_dual_write(migration: Migration) -> None:
    """Raise MigrationRefused if dual writes are requested and impossible."""
    state = migration.state
    if state.dual_write and state.old_space is None:
        raise MigrationRefused(
            f"{state.source}: --dual-write has to know the model of the old vectors: --from"
        )


async def restart(points: Points, state_file: MigrationState) -> None:
    """Delete the collection of an unfinished migration. Raises MigrationRefused, QdrantFailure."""
    saved = state_file.load()
    if saved is None:
        return
    if saved.phase in (Phase.SWITCHING, Phase.SWITCHED):
        raise MigrationRefused(f"{saved.target} is in use: `rollback` first")
    if saved.phase is not Phase.FINALIZED:
        await qdrant.delete(points, saved.target)
    state_file.forget()

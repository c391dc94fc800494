"""Switches clients to the new collection and back, and deletes the old one.

In Qdrant an alias cannot have the name of a collection. So clients that use an alias switch in one
atomic step. For clients that use the old collection's own name an alias is made that they can
change to; `finalize` can give that name to the new collection once the old one is deleted.

After the switch clients write to the new collection, so it must not be made equal to the old one
any more. Late changes (in the old collection, since the snapshot) are carried over, unless the
point has changed in the new one, too, for that change is newer. Clients that continue to write to
the old collection by its own name are followed for some passes, and reported.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from embedding_proxy.index.collection_reader import Point, PointId
from embedding_proxy.index.errors import QdrantFailure

from . import qdrant
from .copy import carry, reads_vectors
from .points import Points, WriteMode, vector_digest
from .runner import Migration, MigrationRefused
from .snapshot import Snapshot, SnapshotRow, content_digest, other_digests
from .state import MigrationState, Phase, State
from .verify import CatchUp, Verdict, verify

DUAL_WRITE_END_S = 3.0
"""In which a proxy learns that dual writes have ended, and its points arrive."""


@dataclass(frozen=True, slots=True)
class MissingLimit:
    """The number of points of the old collection that the new one may lack."""

    number: int = 0
    share: float = 0.0
    """A share of all points, 0 to 1. The larger of both limits applies."""

    def allows(self, missing: int, total: int) -> bool:
        """Tell whether `missing` of `total` points may be missing."""
        return missing <= max(self.number, self.share * total + _ROUNDING)


NONE_MISSING = MissingLimit()
_ROUNDING = 1e-6
"""29 % of 100 points are 29, and in floats a little less."""


async def cutover(
    migration: Migration,
    min_cosine: float,
    alias: str | None,
    *,
    missing: MissingLimit = NONE_MISSING,
) -> Verdict:
    """Verify the new collection, then point the aliases of the old one to it.

    `alias` is created if it does not exist. Writes that reached the old collection meanwhile are
    carried afterwards. Raises MigrationRefused before any alias has changed. Continues an
    interrupted cutover.
    """
    state, points = migration.state, migration.points
    is_switched = state.phase is Phase.SWITCHED and alias in (None, *state.aliases)
    if is_switched and await points_to(points, state.target, state.aliases):
        return Verdict()  # by a command that was given before
    if state.phase not in (Phase.COPIED, Phase.SWITCHING):
        raise MigrationRefused(_not_now(state, "cutover"))
    aliases_now = await qdrant.aliases_of(points, state.target)
    if state.phase is Phase.SWITCHING and state.aliases and set(state.aliases) <= set(aliases_now):
        # Clients write to the new collection already: it must not be made equal to the old.
        verdict = Verdict()
        await _end(migration, verdict)
        return verdict
    moving = await qdrant.aliases_of(points, state.source)
    aliases = sorted({*moving, *aliases_now, *([alias] if alias else [])})
    if not aliases:
        raise MigrationRefused(
            f"clients find {state.source} by its own name, and there can be no alias of that name"
            " while it is there: give --alias NAME, and let clients use that; see docs/migration.md"
        )
    if alias and alias not in {*moving, *aliases_now} and await qdrant.exists(points, alias):
        raise MigrationRefused(
            f"--alias {alias}: there is a collection, or an alias of another, of that name"
        )
    verdict = await _verify(migration, min_cosine, missing)
    # After a kill from here on, the state file names the aliases that moved, or are to move.
    state.aliases, state.phase = aliases, Phase.SWITCHING
    migration.save()
    await qdrant.switch(points, state.target, aliases)
    await _end(migration, verdict)
    return verdict


async def _verify(migration: Migration, min_cosine: float, missing: MissingLimit) -> Verdict:
    """Verify, and store the state of both collections. Raises MigrationRefused."""
    state, state_file = migration.state, migration.state_file
    with closing(Snapshot(state_file.snapshot)) as snapshot:
        verdict = await verify(migration, min_cosine, snapshot)
        snapshot.commit()
    problems = list(verdict.problems)
    if not missing.allows(verdict.dead, verdict.old_points):
        problems.append(
            f"{verdict.dead:,} of {verdict.old_points:,} points could not be carried, see"
            f" {state_file.dead_letters}; --allow-missing {verdict.dead} goes on without them"
        )
    if problems:
        state_file.snapshot.unlink(missing_ok=True)
        raise MigrationRefused(f"{state.collection} stays as it is: {'; '.join(problems)}")
    return verdict


async def _end(migration: Migration, verdict: Verdict) -> None:
    """Carry late changes if there is a snapshot, and complete the cutover."""
    if migration.state_file.snapshot.exists():
        with closing(Snapshot(migration.state_file.snapshot)) as snapshot:
            verdict.late = await catch_up(migration, snapshot)
    migration.state.phase = Phase.SWITCHED
    migration.save()
    migration.state_file.snapshot.unlink(missing_ok=True)


async def rollback(points: Points, state_file: MigrationState) -> State:
    """Point the aliases to the old collection again, also those that `cutover` made.

    Raises MigrationRefused.
    """
    state = load_state(state_file)
    if state.phase is Phase.ROLLED_BACK and await points_to(points, state.source, state.aliases):
        return state  # by a command that was given before
    if state.phase not in (Phase.SWITCHING, Phase.SWITCHED):
        raise MigrationRefused(_not_now(state, "rollback"))
    if not await qdrant.exists(points, state.source):
        raise MigrationRefused(f"{state.source} is not there any more: there is no way back")
    # Whatever fails from here on, the state says that the aliases may have moved.
    state.phase = Phase.SWITCHING
    state_file.save(state)
    await qdrant.switch(points, state.source, state.aliases)
    state.phase = Phase.ROLLED_BACK
    state_file.save(state)
    state_file.snapshot.unlink(missing_ok=True)
    return state


async def finalize(
    points: Points,
    state_file: MigrationState,
    *,
    take_name: bool = False,
    missing: MissingLimit = NONE_MISSING,
    snapshot: bool = False,
) -> State:
    """Delete the old collection. With `take_name` its name becomes an alias of the new one.

    With `snapshot` the server keeps a snapshot of the old collection. Raises MigrationRefused.
    """
    state = await check_finalize(points, state_file, missing)
    if state.phase is Phase.SWITCHED:
        if snapshot and await qdrant.exists(points, state.source):
            state.snapshot = await qdrant.make_snapshot(points, state.source)
            state_file.save(state)
        if state.dual_write:
            # The proxy sends what it has for the old collection before that is deleted.
            state.dual_write = False
            state_file.save(state)
            await points.pause(DUAL_WRITE_END_S)
        await qdrant.delete(points, state.source)
        state.phase = Phase.FINALIZED
        state_file.save(state)
    if take_name:
        try:
            await qdrant.switch(points, state.target, [state.source])
        except QdrantFailure as error:
            raise MigrationRefused(
                f"{state.source} is deleted, and its name is no alias yet: {error};"
                " `finalize --take-name` again makes it one"
            ) from error
    return state


async def check_finalize(
    points: Points, state_file: MigrationState, missing: MissingLimit
) -> State:
    """Return the state if the old collection may be deleted, or is deleted.

    Raises MigrationRefused.
    """
    state = load_state(state_file)
    if state.phase is Phase.FINALIZED:
        return state
    if state.phase is not Phase.SWITCHED:
        raise MigrationRefused(_not_now(state, "finalize"))
    if not await points_to(points, state.target, state.aliases):
        raise MigrationRefused(
            f"the aliases of {state.collection} were changed since the cutover: look first"
            " which collection is in use"
        )
    if await qdrant.exists(points, state.source):
        old, new = await points.count(state.source), await points.count(state.target)
        if not missing.allows(old - new, old):
            raise MigrationRefused(
                f"{state.target} has {new:,} points, and {state.source} has {old:,}: if the other"
                f" {old - new:,} may be lost, say so: --allow-missing {old - new}"
            )
    return state


def load_state(state_file: MigrationState) -> State:
    """Return the state of a migration. Raises MigrationRefused where there is none."""
    state = state_file.load()
    if state is None:
        raise MigrationRefused("no migration of it is known here: begin with `plan` and `run`")
    return state


async def points_to(points: Points, name: str, aliases: Sequence[str]) -> bool:
    """Tell whether all these aliases point to this collection."""
    return set(aliases) <= set(await qdrant.aliases_of(points, name))


async def count_missing(points: Points, source: str, target: str) -> int:
    """Return the number of points of `source` that `target` lacks."""
    count = 0
    async for page in points.pages(source, 1000):
        ids = [point.id for point in page.points]
        count += len(ids) - len(await points.get_points(target, ids))
    return count


def _not_now(state: State, step: str) -> str:
    expected = {
        Phase.COPYING: "`run` has not come to its end",
        Phase.COPIED: "`cutover` has not been done",
        Phase.SWITCHING: "`cutover` or `rollback` was interrupted; do it again",
        Phase.SWITCHED: "`cutover` has been done",
        Phase.ROLLED_BACK: "it was rolled back; `run` goes on",
        Phase.FINALIZED: "it is finalized: the old collection is deleted",
    }[state.phase]
    return f"{step} of {state.collection} is not possible now: {expected}"


async def catch_up(migration: Migration, snapshot: Snapshot) -> CatchUp:
    """Carry late changes until a pass finds none, for `pace.passes` passes at most.

    Raises QdrantFailure, EmbeddingError, MigrationStateError. Another call continues.
    """
    late = CatchUp()
    for _ in range(migration.pace.passes):
        change_count = await _pass(migration, snapshot, late)
        migration.save()
        snapshot.commit()
        if not change_count:
            late.quiet = True
            break
    return late


async def _pass(migration: Migration, snapshot: Snapshot, late: CatchUp) -> int:
    """Compare the whole old collection with the snapshot; return the number of late changes."""
    state, size = migration.state, migration.pace.page
    change_count = number = 0
    title = f"catching up with {state.collection}"
    with migration.progress(title, await migration.points.count(state.source)) as tell:
        async for page in migration.points.pages(
            state.source, size, vectors=reads_vectors(migration)
        ):
            rows = snapshot.rows([point.id for point in page.points])
            changed = [
                point
                for point in page.points
                if point.id not in rows or _has_changed(point, rows[point.id])
            ]
            if changed:
                change_count += len(changed)
                await _carry(migration, changed, rows, snapshot, late)
            number += len(page.points)
            tell(number)
    for ids in snapshot.pages(size):
        sources = await migration.points.get_points(state.source, ids)
        deleted = [id_ for id_ in ids if id_ not in sources]
        if deleted:
            change_count += len(deleted)
            await _delete(migration, deleted, snapshot, late)
    return change_count


async def _carry(
    migration: Migration,
    changed: Sequence[Point],
    rows: dict[PointId, SnapshotRow],
    snapshot: Snapshot,
    late: CatchUp,
) -> None:
    """Carry late changes of points: the parts that no client has changed in the new collection."""
    state, counts = migration.state, migration.state.counts
    ids = [point.id for point in changed]
    new = await migration.points.get_points(state.target, ids, vectors=True)
    late_changes = {
        point.id: _late_change(point, rows.get(point.id), new.get(point.id)) for point in changed
    }
    late.left += sum(change.is_left for change in late_changes.values())
    result = await carry(
        migration, [point for point in changed if late_changes[point.id].has_content]
    )
    refused = [letter["id"] for letter in result.letters]
    carried_points = {point.id: point for point in result.points}
    for point in changed:
        change, target_point = late_changes[point.id], new.get(point.id)
        if target_point is None or point.id in refused:
            continue
        if point.id in carried_points or change.names:
            others = dict(target_point.others or {})
            for name in change.names:
                others.pop(name, None)
                if name in (point.others or {}):
                    others[name] = (point.others or {})[name]
            carried_points[point.id] = replace(
                carried_points.get(point.id, target_point), others=others or None
            )
    # The next pass carries points that a client has changed since the new points were read.
    targets_now = await migration.points.get_points(
        state.target, list(carried_points), vectors=True
    )
    moved = {id_ for id_ in carried_points if not _is_same(targets_now.get(id_), new.get(id_))}
    points = [point for id_, point in carried_points.items() if id_ not in moved]
    fresh = [point for point in points if point.id not in new]
    updates = [point for point in points if point.id in new]
    modes: tuple[tuple[list[Point], WriteMode], ...] = (
        (fresh, "insert_only"),
        (updates, "update_only"),
    )
    for batch, mode in modes:
        await migration.points.write(state.target, batch, mode)
        # On disk at once: a client may have deleted a point before it is carried a second time.
        carried = {point.id: point for point in batch}
        snapshot.add((point for point in changed if point.id in carried), carried)
        snapshot.commit()
    # A point without a new vector must not be found by its old one.
    await migration.points.delete(state.target, [id_ for id_ in refused if id_ in new])
    migration.state_file.append_dead_letters(result.letters)
    result.add_to(counts)
    counts.updated += len(points) - len(fresh)
    counts.dead += len(refused)
    late.written += len(points)
    late.dead += len(refused)
    there_now = await migration.points.get_points(
        state.target, ids, vectors=reads_vectors(migration)
    )
    snapshot.add((point for point in changed if point.id not in moved), there_now)
    snapshot.commit()


@dataclass(frozen=True, slots=True)
class _LateChange:
    """The parts of a point that have changed since the snapshot, and may be carried."""

    has_content: bool = False
    """Whether these are its payload and its migrated vector."""
    names: Sequence[str] = ()
    """The names of such other vectors."""
    is_left: bool = False
    """Whether a part is not carried, because a client has changed it in the new collection."""


def _late_change(old: Point, row: SnapshotRow | None, new: Point | None) -> _LateChange:
    if row is None or not row.carried or new is None:
        # An interrupted pass has already carried this point.
        is_free = new is None and (row is None or not row.carried)
        is_left = not is_free and (new is None or new.digest() != old.digest())
        return _LateChange(is_free, is_left=is_left)
    has_changed = row.content != content_digest(old)
    is_touched = new.digest() != row.payload or (
        row.vector is not None and row.vector != vector_digest(new.vector)
    )
    names, touched = [], has_changed and is_touched and new.digest() != old.digest()
    for name in {*(row.old or {}), *(old.others or {})} if row.old is not None else ():
        mine, theirs = (
            vector_digest((vectors or {}).get(name)) for vectors in (old.others, new.others)
        )
        if mine == (row.old or {}).get(name):
            continue
        if theirs == (row.new or {}).get(name):
            names.append(name)
        else:
            touched |= theirs != mine
    return _LateChange(has_changed and not is_touched, names, touched)


def _is_same(before: Point | None, after: Point | None) -> bool:
    """Tell whether a point is unchanged."""
    if before is None or after is None:
        return before is after
    return content_digest(before) == content_digest(after) and (
        other_digests(before) == other_digests(after)
    )


async def _delete(
    migration: Migration, deleted: list[PointId], snapshot: Snapshot, late: CatchUp
) -> None:
    rows = snapshot.rows(deleted)
    new = await migration.points.get_points(
        migration.state.target, deleted, vectors=reads_vectors(migration)
    )
    mine = [id_ for id_ in new if _is_untouched(rows[id_], new[id_])]
    await migration.points.delete(migration.state.target, mine)
    migration.state.counts.deleted += len(mine)
    late.deleted += len(mine)
    late.left += len(new) - len(mine)
    snapshot.remove(deleted)
    snapshot.commit()


def _has_changed(old: Point, row: SnapshotRow) -> bool:
    """Tell whether a point of the old collection differs from the snapshot."""
    return row.content != content_digest(old) or row.old not in (None, other_digests(old))


def _is_untouched(row: SnapshotRow, new: Point) -> bool:
    """Tell whether a point of the new collection is as the cutover left it."""
    if not row.carried or new.digest() != row.payload:
        return False
    if row.vector is not None and row.vector != vector_digest(new.vector):
        return False
    return row.new in (None, other_digests(new))

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

from embedding_proxy.index.collection_reader import Point, PointId

from . import qdrant
from .copy import carry, reads_vectors
from .qdrant import Points
from .runner import Migration, MigrationRefused
from .snapshot import Snapshot, SnapshotRow, content_digest
from .state import MigrationState, Phase, State
from .verify import CatchUp, Verdict, verify


async def cutover(
    migration: Migration, least: float, alias: str | None, *, allow_missing: bool
) -> Verdict:
    """Verify the new collection, then let the aliases of the old one point to it.

    `alias` is made if it is not there. What reached the old collection meanwhile is carried then.
    Raises MigrationRefused: then no alias has changed. Continues an interrupted cutover.
    """
    state, points = migration.state, migration.points
    if state.phase not in (Phase.COPIED, Phase.SWITCHING):
        raise MigrationRefused(_not_now(state, "cutover"))
    there = await qdrant.aliases_of(points, state.target)
    if state.phase is Phase.SWITCHING and state.aliases and set(state.aliases) <= set(there):
        # Clients write to the new collection already: it must not be made equal to the old.
        verdict = Verdict()
        await _end(migration, verdict)
        return verdict
    moving = await qdrant.aliases_of(points, state.source)
    aliases = sorted({*moving, *there, *([alias] if alias else [])})
    if not aliases:
        raise MigrationRefused(
            f"clients find {state.source} by its own name, and there can be no alias of that name"
            " while it is there: give --alias NAME, and let clients use that; see docs/migration.md"
        )
    if alias and alias not in {*moving, *there} and await qdrant.exists(points, alias):
        raise MigrationRefused(
            f"--alias {alias}: there is a collection, or an alias of another, of that name"
        )
    verdict = await _verify(migration, least, allow_missing=allow_missing)
    # After a kill from here on, the state file names the aliases that moved, or are to move.
    state.aliases, state.phase = aliases, Phase.SWITCHING
    migration.save()
    await qdrant.switch(points, state.target, aliases)
    await _end(migration, verdict)
    return verdict


async def _verify(migration: Migration, least: float, *, allow_missing: bool) -> Verdict:
    """Verify, and keep what the old collection held then. Raises MigrationRefused."""
    state, state_file = migration.state, migration.state_file
    with closing(Snapshot(state_file.snapshot)) as snapshot:
        verdict = await verify(migration, least, snapshot)
        snapshot.commit()
    against = "; ".join(verdict.problems)
    if verdict.good and verdict.dead and not allow_missing:
        against = (
            f"{verdict.dead:,} points could not be carried, see {state_file.dead_letters};"
            " --allow-missing goes on without them"
        )
    if against:
        state_file.snapshot.unlink(missing_ok=True)
        raise MigrationRefused(f"{state.collection} stays as it is: {against}")
    return verdict


async def _end(migration: Migration, verdict: Verdict) -> None:
    """Carry late changes if there is a snapshot; then the cutover is done."""
    if migration.state_file.snapshot.exists():
        with closing(Snapshot(migration.state_file.snapshot)) as snapshot:
            verdict.late = await catch_up(migration, snapshot)
    migration.state.phase = Phase.SWITCHED
    migration.save()
    migration.state_file.snapshot.unlink(missing_ok=True)


async def rollback(points: Points, state_file: MigrationState) -> tuple[State, int]:
    """Point the aliases to the old collection again, also those that `cutover` made.

    Returns also how many points the new collection has that the old one lacks: they were written
    since. Raises MigrationRefused.
    """
    state = load_state(state_file)
    if state.phase not in (Phase.SWITCHING, Phase.SWITCHED):
        raise MigrationRefused(_not_now(state, "rollback"))
    if not await qdrant.exists(points, state.source):
        raise MigrationRefused(f"{state.source} is not there any more: there is no way back")
    await qdrant.switch(points, state.source, state.aliases)
    state.phase = Phase.ROLLED_BACK
    state_file.save(state)
    state_file.snapshot.unlink(missing_ok=True)
    return state, await only_in(points, state.target, state.source)


async def finalize(points: Points, state_file: MigrationState, *, take_name: bool = False) -> State:
    """Delete the old collection; with `take_name`, let its name be an alias of the new one.

    Raises MigrationRefused.
    """
    state = load_state(state_file)
    if state.phase is not Phase.SWITCHED and not (take_name and state.phase is Phase.FINALIZED):
        raise MigrationRefused(_not_now(state, "finalize"))
    if state.phase is Phase.SWITCHED:
        if not await points_to(points, state.target, state.aliases):
            raise MigrationRefused(
                f"the aliases of {state.collection} were changed since the cutover: look first"
                " which collection is in use"
            )
        await qdrant.delete(points, state.source)
    if take_name:
        await qdrant.switch(points, state.target, [state.source])
    state.phase = Phase.FINALIZED
    state_file.save(state)
    return state


def load_state(state_file: MigrationState) -> State:
    """Return the state of a migration. Raises MigrationRefused where there is none."""
    state = state_file.load()
    if state is None:
        raise MigrationRefused("no migration of it is known here: begin with `plan` and `run`")
    return state


async def points_to(points: Points, name: str, aliases: Sequence[str]) -> bool:
    """Return whether these aliases are all of this collection."""
    return set(aliases) <= set(await qdrant.aliases_of(points, name))


async def only_in(points: Points, one: str, other: str) -> int:
    """Return how many points a collection has that another lacks."""
    count = 0
    async for page in points.pages(one, 1000):
        ids = [point.id for point in page.points]
        count += len(ids) - len(await points.get_points(other, ids))
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

    Raises QdrantFailure, EmbeddingError, MigrationStateError; done again, it goes on.
    """
    late = CatchUp()
    for _ in range(migration.pace.passes):
        found = await _pass(migration, snapshot, late)
        migration.save()
        snapshot.commit()
        if not found:
            late.quiet = True
            break
    return late


async def _pass(migration: Migration, snapshot: Snapshot, late: CatchUp) -> int:
    """Compare the whole old collection with the snapshot; return the number of late changes."""
    state, size = migration.state, migration.pace.page
    found = number = 0
    title = f"catching up with {state.collection}"
    with migration.progress(title, await migration.points.count(state.source)) as tell:
        async for page in migration.points.pages(
            state.source, size, vectors=reads_vectors(migration)
        ):
            rows = snapshot.rows([one.id for one in page.points])
            changed = [
                one
                for one in page.points
                if one.id not in rows or rows[one.id].content != content_digest(one)
            ]
            if changed:
                found += len(changed)
                await _carry(migration, changed, rows, snapshot, late)
            number += len(page.points)
            tell(number)
    for ids in snapshot.pages(size):
        there = await migration.points.get_points(state.source, ids)
        gone = [one for one in ids if one not in there]
        if gone:
            found += len(gone)
            await _delete(migration, gone, snapshot, late)
    return found


async def _carry(
    migration: Migration,
    changed: Sequence[Point],
    rows: dict[PointId, SnapshotRow],
    snapshot: Snapshot,
    late: CatchUp,
) -> None:
    state, counts = migration.state, migration.state.counts
    new = await migration.points.get_points(state.target, [one.id for one in changed])
    mine = []
    for one in changed:
        row, there = rows.get(one.id), new.get(one.id)
        if _is_untouched(row, there):
            mine.append(one)
        # A point that an interrupted pass has carried is neither.
        elif there is None or there.digest() != one.digest():
            late.left += 1
    done = await carry(migration, mine)
    fresh = [one for one in done.points if one.id not in new]
    await migration.points.write(state.target, fresh, only_new=True)
    await migration.points.write(state.target, [one for one in done.points if one.id in new])
    # A point without a new vector must not be found by its old one.
    refused = [letter["id"] for letter in done.letters]
    await migration.points.delete(state.target, [one for one in refused if one in new])
    migration.state_file.append_dead_letters(done.letters)
    counts.embedded += done.embedded
    counts.copied += len(done.points) - done.embedded
    counts.updated += len(done.points) - len(fresh)
    counts.dead += len(refused)
    late.written += len(done.points)
    late.dead += len(refused)
    snapshot.add(changed, refused)


async def _delete(
    migration: Migration, gone: list[PointId], snapshot: Snapshot, late: CatchUp
) -> None:
    rows = snapshot.rows(gone)
    new = await migration.points.get_points(migration.state.target, gone)
    mine = [one for one in new if _is_untouched(rows[one], new[one])]
    await migration.points.delete(migration.state.target, mine)
    migration.state.counts.deleted += len(mine)
    late.deleted += len(mine)
    late.left += len(new) - len(mine)
    snapshot.remove(gone)


def _is_untouched(row: SnapshotRow | None, new: Point | None) -> bool:
    """Tell whether a point of the new collection is as the cutover left it."""
    if row is None or not row.carried:
        return new is None
    return new is not None and new.digest() == row.payload

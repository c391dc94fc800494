"""Which collection clients find: the switch to the new one, the way back, and the end of the old.

Qdrant has no alias of a name that a collection has. So clients that use an alias are switched at
one moment; for those that use the old collection's own name, an alias is made that they can change
to, and `finalize` can give that name to the new collection once the old one is deleted.

From the switch on clients write to the new collection, so it must not be made equal to the old one
any more. What has changed in the old one since it was last seen is late: it is carried over unless
the point has changed in the new one, too, for that is newer. Whoever uses the old collection by its
own name and goes on writing is followed for some passes, and told of.
"""

from collections.abc import Sequence
from contextlib import closing

from embedding_proxy.index.collection_reader import Point, PointId

from . import qdrant
from .copy import carry, reads_vectors
from .qdrant import Points
from .runner import Migration, MigrationRefused
from .snapshot import Row, Snapshot, whole
from .state import MigrationState, Phase, State
from .verify import Late, Verdict, verify


async def cutover(
    migration: Migration, least: float, alias: str | None, *, allow_missing: bool
) -> Verdict:
    """Verify the new collection, then let the aliases of the old one point to it.

    `alias` is made if it is not there. What reached the old collection meanwhile is carried then.
    Raises MigrationRefused: then no alias has changed. An interrupted cutover is gone on with.
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
    verdict = await _verified(migration, least, allow_missing=allow_missing)
    # Whoever is killed from here on finds in the journal what has been moved, or is about to be.
    state.aliases, state.phase = aliases, Phase.SWITCHING
    migration.save()
    await qdrant.switch(points, state.target, aliases)
    await _end(migration, verdict)
    return verdict


async def _verified(migration: Migration, least: float, *, allow_missing: bool) -> Verdict:
    """Verify, and keep what the old collection held then. Raises MigrationRefused."""
    state, journal = migration.state, migration.journal
    with closing(Snapshot(journal.seen)) as seen:
        verdict = await verify(migration, least, seen)
        seen.keep()
    against = "; ".join(verdict.problems)
    if verdict.good and verdict.dead and not allow_missing:
        against = (
            f"{verdict.dead:,} points could not be carried, see {journal.dead_letters};"
            " --allow-missing goes on without them"
        )
    if against:
        journal.seen.unlink(missing_ok=True)
        raise MigrationRefused(f"{state.collection} stays as it is: {against}")
    return verdict


async def _end(migration: Migration, verdict: Verdict) -> None:
    """Carry what is late, if it is known what is; then the cutover is done."""
    if migration.journal.seen.exists():
        with closing(Snapshot(migration.journal.seen)) as seen:
            verdict.late = await catch_up(migration, seen)
    migration.state.phase = Phase.SWITCHED
    migration.save()
    migration.journal.seen.unlink(missing_ok=True)


async def rollback(points: Points, journal: MigrationState) -> tuple[State, int]:
    """Let the aliases point to the old collection again, those that `cutover` made too.

    Returns also how many points the new collection has that the old one lacks: what was written
    since. Raises MigrationRefused.
    """
    state = begun(journal)
    if state.phase not in (Phase.SWITCHING, Phase.SWITCHED):
        raise MigrationRefused(_not_now(state, "rollback"))
    if not await qdrant.exists(points, state.source):
        raise MigrationRefused(f"{state.source} is not there any more: there is no way back")
    await qdrant.switch(points, state.source, state.aliases)
    state.phase = Phase.ROLLED_BACK
    journal.save(state)
    journal.seen.unlink(missing_ok=True)
    return state, await only_in(points, state.target, state.source)


async def finalize(points: Points, journal: MigrationState, *, take_name: bool = False) -> State:
    """Delete the old collection; with `take_name`, let its name be an alias of the new one.

    Raises MigrationRefused.
    """
    state = begun(journal)
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
    journal.save(state)
    return state


def begun(journal: MigrationState) -> State:
    """Return the state of a migration. Raises MigrationRefused where there is none."""
    state = journal.load()
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
        count += len(ids) - len(await points.those(other, ids))
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


async def catch_up(migration: Migration, seen: Snapshot) -> Late:
    """Carry what is late, until a pass finds nothing, for so many passes at most.

    Raises QdrantFailure, EmbeddingError, JournalError; done again, it goes on.
    """
    late = Late()
    for _ in range(migration.pace.passes):
        found = await _pass(migration, seen, late)
        migration.save()
        seen.keep()
        if not found:
            late.quiet = True
            break
    return late


async def _pass(migration: Migration, seen: Snapshot, late: Late) -> int:
    """Look at the whole old collection; return how many points were late."""
    state, size = migration.state, migration.pace.page
    found = number = 0
    title = f"catching up with {state.collection}"
    with migration.progress(title, await migration.points.count(state.source)) as tell:
        async for page in migration.points.pages(
            state.source, size, vectors=reads_vectors(migration)
        ):
            rows = seen.rows([one.id for one in page.points])
            changed = [
                one for one in page.points if one.id not in rows or rows[one.id].whole != whole(one)
            ]
            if changed:
                found += len(changed)
                await _carry(migration, changed, rows, seen, late)
            number += len(page.points)
            tell(number)
    for ids in seen.pages(size):
        there = await migration.points.those(state.source, ids)
        gone = [one for one in ids if one not in there]
        if gone:
            found += len(gone)
            await _delete(migration, gone, seen, late)
    return found


async def _carry(
    migration: Migration,
    changed: Sequence[Point],
    rows: dict[PointId, Row],
    seen: Snapshot,
    late: Late,
) -> None:
    state, counts = migration.state, migration.state.counts
    new = await migration.points.those(state.target, [one.id for one in changed])
    mine = []
    for one in changed:
        row, there = rows.get(one.id), new.get(one.id)
        if _untouched(row, there):
            mine.append(one)
        # What an interrupted pass has carried already is neither.
        elif there is None or there.digest() != one.digest():
            late.left += 1
    done = await carry(migration, mine)
    fresh = [one for one in done.points if one.id not in new]
    await migration.points.write(state.target, fresh, only_new=True)
    await migration.points.write(state.target, [one for one in done.points if one.id in new])
    # What has no vector any more must not be found by its old one.
    refused = [letter["id"] for letter in done.letters]
    await migration.points.delete(state.target, [one for one in refused if one in new])
    migration.journal.bury(done.letters)
    counts.embedded += done.embedded
    counts.copied += len(done.points) - done.embedded
    counts.updated += len(done.points) - len(fresh)
    counts.dead += len(refused)
    late.written += len(done.points)
    late.dead += len(refused)
    seen.add(changed, refused)


async def _delete(migration: Migration, gone: list[PointId], seen: Snapshot, late: Late) -> None:
    rows = seen.rows(gone)
    new = await migration.points.those(migration.state.target, gone)
    mine = [one for one in new if _untouched(rows[one], new[one])]
    await migration.points.delete(migration.state.target, mine)
    migration.state.counts.deleted += len(mine)
    late.deleted += len(mine)
    late.left += len(new) - len(mine)
    seen.remove(gone)


def _untouched(row: Row | None, new: Point | None) -> bool:
    """Tell whether a point of the new collection is as the cutover left it."""
    if row is None or not row.carried:
        return new is None
    return new is not None and new.digest() == row.payload

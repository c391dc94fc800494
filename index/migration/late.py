"""What reached the old collection while the aliases were switched: carried over afterwards.

From the switch on clients write to the new collection, so it must not be made equal to the old one
any more. What has changed in the old one since it was last seen is late; it is carried unless the
point has changed in the new one, too: then a client has written it since the switch, and that is
newer. Whoever uses the old collection by its own name and goes on writing is followed for some
passes, and told of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from index.collection_reader import Point, PointId
from index.migrate import Migration

from .copy import carry, reads_vectors
from .seen import Row, Seen, whole


@dataclass(slots=True)
class Late:
    """What became of late changes."""

    written: int = 0
    """Points written to the new collection."""
    deleted: int = 0
    left: int = 0
    """Points that stayed as they are in the new one, where they were changed since."""
    dead: int = 0
    """Points that cannot be carried; the dead letters say why."""
    quiet: bool = False
    """Whether the last look at the old collection found nothing late."""


async def catch_up(migration: Migration, seen: Seen) -> Late:
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


async def _pass(migration: Migration, seen: Seen, late: Late) -> int:
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
    seen: Seen,
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


async def _delete(migration: Migration, gone: list[PointId], seen: Seen, late: Late) -> None:
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

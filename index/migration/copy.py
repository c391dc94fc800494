"""The passes of a migration, which make points of the old collection points of the new one.

Before vectors are copied, sampled texts verify that they may be: what is known may be wrong. A
point is written with a sound vector of the new model, or not at all: then a dead letter says why.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from embedding_proxy.index.collection_reader import Page, Point, PointId
from embedding_proxy.providers import vector
from embedding_proxy.providers.dimensions import derive

from .embedding import Rejection
from .points import is_copy
from .runner import Migration, MigrationRefused
from .snapshot import Snapshot
from .state import Counts, Phase

T = TypeVar("T")
R = TypeVar("R")

Refusals = dict[PointId, tuple[bytes, str]]
"""Points that cannot be carried: the digest of their payload then, and why."""


@dataclass(slots=True)
class CarryResult:
    """Some points after their migration."""

    points: list[Point] = field(default_factory=list)
    """With their new vectors."""
    embedded: int = 0
    without_vector: int = 0
    letters: list[dict[str, Any]] = field(default_factory=list)

    def add_to(self, counts: Counts) -> None:
        """Count the points that were written."""
        counts.embedded += self.embedded
        counts.without_vector += self.without_vector
        counts.copied += len(self.points) - self.embedded - self.without_vector


async def carry(migration: Migration, points: Sequence[Point]) -> CarryResult:
    """Give each point its new vector, or a dead letter. Raises EmbeddingError, QdrantFailure.

    A point that has neither a text nor an old vector stays without one: its payload and its other
    vectors are carried.
    """
    done = CarryResult()
    texts: list[tuple[Point, str]] = []
    textless: list[tuple[Point, str]] = []
    for point in points:
        wrong = migration.vector_error(point) if migration.regime.copies else "not looked at"
        if wrong is None:
            (new,) = derive([point.vector or b""], migration.model.dimensions)
            done.points.append(point.with_vector(new))
        elif (text := migration.rule.text(point.payload)) is not None:
            texts.append((point, text))
        else:
            textless.append((point, wrong))
    bare = await _without_vector(migration, [point for point, _ in textless])
    for point, wrong in textless:
        if point.id in bare:
            done.points.append(point)
            done.without_vector += 1
            continue
        why = f"no text: {_nothing_at(migration)}"
        if migration.regime.copies:
            why = f"the vector: {wrong}; {why}"
        done.letters.append(letter(point, why))
    answers = await migration.embedder.embed([text for _, text in texts])
    for (point, _), answer in zip(texts, answers, strict=True):
        if isinstance(answer, Rejection):
            done.letters.append(letter(point, answer.why))
        else:
            done.points.append(point.with_vector(answer))
            done.embedded += 1
    return done


async def _without_vector(migration: Migration, points: Sequence[Point]) -> set[PointId]:
    """Return those of some points that have no vector to migrate."""
    if not reads_vectors(migration):
        ids = [point.id for point in points]
        there = await migration.points.get_points(migration.state.source, ids, vectors=True)
        points = list(there.values())
    return {point.id for point in points if point.vector is None}


def letter(point: Point, why: str) -> dict[str, Any]:
    """Return the dead letter of a point; it holds nothing of its payload."""
    return {"id": point.id, "why": why}


def _nothing_at(migration: Migration) -> str:
    if not migration.rule.fields:
        return f"{migration.rule.source} gives none"
    return f"nothing at {', '.join(f'`{name}`' for name in migration.rule.fields)}"


async def verify_sample(migration: Migration, least: float) -> None:
    """Embed sampled texts without the cache, and compare them with the old vectors.

    Raises MigrationRefused if one differs: then nothing has been copied.
    """
    state, width = migration.state, migration.model.dimensions
    if not migration.regime.copies or state.proof is not None:
        return
    drawn = await migration.points.sample(state.source, 4 * migration.pace.sample)
    sound = [one for one in drawn if migration.vector_error(one) is None]
    able = [(one, text) for one in sound if (text := migration.rule.text(one.payload)) is not None]
    able = able[: migration.pace.sample]
    if not able:
        if await migration.points.count(state.source):
            raise MigrationRefused(
                f"{state.source}: none of {len(drawn)} sampled points has a text at"
                f" {state.rule} and a sound vector: nothing proves that vectors may be copied"
            )
        return
    answers = await migration.embedder.embed([text for _, text in able], anew=True)
    pairs = zip((one for one, _ in able), answers, strict=True)
    there = [(one, new) for one, new in pairs if not isinstance(new, Rejection)]
    cosines = [vector.cosine(derive([one.vector or b""], width)[0], new) for one, new in there]
    if not there:
        raise MigrationRefused(f"{state.model} takes none of the sampled texts")
    off = sum(cosine < least for cosine in cosines)
    migration.save()
    if off:
        raise MigrationRefused(
            f"{off} of {len(there)} sampled texts of {state.source} have other vectors in"
            f" {state.model} (cosine {min(cosines):.3f}, wanted {least}): these vectors are not of"
            f" this model and this text ({state.rule}); --regime reembed buys them"
        )
    state.proof = min(cosines)
    state.proved = [one.id for one, _ in there]
    migration.save()


async def copy(migration: Migration) -> None:
    """Carry the old points in the order of their ids, from the checkpoint on.

    What is in the new collection already is neither embedded nor written again. Raises
    QdrantFailure, EmbeddingError, MigrationStateError.
    """
    state, pace = migration.state, migration.pace
    if state.first_pass_done:
        return

    async def work(page: Page) -> CarryResult:
        ids = [point.id for point in page.points]
        there = await migration.points.get_points(state.target, ids)
        return await carry(migration, [one for one in page.points if one.id not in there])

    total, size = await migration.points.count(state.source), migration.pace.page
    with migration.progress(f"copying {state.collection}", total) as tell:
        tell(state.counts.points)
        pages = migration.points.pages(
            state.source, size, state.offset, vectors=reads_vectors(migration)
        )
        async with contextlib.aclosing(map_concurrently(pages, work, pace.ahead)) as carried:
            async for page, done in carried:
                await _write_page(migration, page, done)
                tell(state.counts.points)
                if pace.points_per_second:
                    await migration.sleep(len(page.points) / pace.points_per_second)
    # An empty collection has no page.
    state.first_pass_done = True
    migration.save()


async def map_concurrently(
    items: AsyncIterator[T], work: Callable[[T], Awaitable[R]], max_tasks: int
) -> AsyncGenerator[tuple[T, R]]:
    """Yield items and the results of `work`, in order; up to `max_tasks` run at a time."""
    tasks: deque[tuple[T, asyncio.Future[R]]] = deque()
    try:
        async for item in items:
            tasks.append((item, asyncio.ensure_future(work(item))))
            if len(tasks) >= max_tasks:
                first, doing = tasks[0]
                result = await doing
                tasks.popleft()
                yield first, result
        while tasks:
            first, doing = tasks[0]
            result = await doing
            tasks.popleft()
            yield first, result
    finally:
        for _, doing in tasks:
            doing.cancel()
        for _, doing in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await doing


async def _write_page(migration: Migration, page: Page, done: CarryResult) -> None:
    """Write a page, then the checkpoint after it."""
    state, counts = migration.state, migration.state.counts
    await migration.points.write(state.target, done.points, "insert_only")
    migration.state_file.append_dead_letters(done.letters)
    counts.points += len(page.points)
    done.add_to(counts)
    counts.dead += len(done.letters)
    state.offset, state.first_pass_done = page.after, page.after is None
    migration.save()


def reads_vectors(migration: Migration) -> bool:
    """Tell whether the old vectors are needed: to copy them, or others beside them."""
    return migration.regime.copies or bool(migration.old.others)


def is_little(migration: Migration, repaired: int) -> bool:
    """Tell whether so few points differed in a pass that the cutover can carry what is left.

    Another whole pass would find as many again where clients write all the time.
    """
    return repaired <= max(migration.pace.page, migration.state.counts.points // 100)


async def follow(migration: Migration) -> None:
    """Compare both collections and repair the new one, until a pass finds little.

    What is written from then on is carried by the cutover. Raises MigrationRefused if the old one
    changes faster than it can be followed.
    """
    state = migration.state
    refused: Refusals = {}
    for number in range(1, migration.pace.passes + 1):
        repaired = await compare(migration, refused, f"comparing {state.collection}, pass {number}")
        if is_little(migration, repaired):
            state.phase = Phase.COPIED
            migration.save()
            return
    raise MigrationRefused(
        f"{state.source} still changes after {migration.pace.passes} passes: run it again when"
        " fewer writes arrive, or give more --passes"
    )


async def compare(
    migration: Migration, refused: Refusals, title: str, snapshot: Snapshot | None = None
) -> int:
    """Make the new collection equal to the old; return how many points were repaired.

    Points in `refused` are not tried again; newly refused ones are added to it. The dead letters
    are replaced by those of this pass. `snapshot` receives all points of the old collection.
    """
    state, counts = migration.state, migration.state.counts
    total, size = await migration.points.count(state.source), migration.pace.page
    letters: list[dict[str, Any]] = []
    number = repaired = 0
    with migration.progress(title, total) as tell:
        async for page in migration.points.pages(
            state.source, size, vectors=reads_vectors(migration)
        ):
            written, there = await _repair(migration, page.points, refused, letters)
            repaired += len(written)
            if snapshot is not None:
                await _take_down(migration, snapshot, page.points, written, there)
            number += len(page.points)
            tell(number)
        orphans = await _delete_orphans(migration)
        repaired += len(orphans)
        if snapshot is not None:
            snapshot.remove(orphans)
    migration.state_file.replace_dead_letters(letters)
    counts.points, counts.dead = number, len(letters)
    migration.save()
    return repaired


async def _take_down(
    migration: Migration,
    snapshot: Snapshot,
    points: Sequence[Point],
    written: Sequence[PointId],
    there: dict[PointId, Point],
) -> None:
    """Store some points in the snapshot, as both collections have them now."""
    again = await migration.points.get_points(
        migration.state.target, written, vectors=reads_vectors(migration)
    )
    new = {one: point for one, point in there.items() if one not in written} | again
    rule = migration.rule
    snapshot.add(points, new, {one.id for one in points if rule.text(one.payload) is not None})


async def _repair(
    migration: Migration,
    points: Sequence[Point],
    refused: Refusals,
    letters: list[dict[str, Any]],
) -> tuple[list[PointId], dict[PointId, Point]]:
    """Write the points that are missing or differ.

    Returns the ids that were written or deleted, and the points that were there before.
    """
    state, counts = migration.state, migration.state.counts
    ids = [point.id for point in points]
    there = await migration.points.get_points(state.target, ids, vectors=reads_vectors(migration))
    wrong = [one for one in points if _differs(migration, one, there.get(one.id))]
    known = {one.id: one for one in wrong if refused.get(one.id, (b"",))[0] == one.digest()}
    letters += [letter(one, refused[one.id][1]) for one in known.values()]
    asked = {one.id: one for one in wrong if one.id not in known}
    done = await carry(migration, list(asked.values()))
    letters += done.letters
    for found in done.letters:
        refused[found["id"]] = (asked[found["id"]].digest(), found["why"])
    await migration.points.write(state.target, done.points)
    # A point without a new vector must not be found by its old one.
    stale = [found["id"] for found in done.letters if found["id"] in there]
    await migration.points.delete(state.target, stale)
    done.add_to(counts)
    counts.updated += sum(one.id in there for one in done.points)
    counts.deleted += len(stale)
    return [*(one.id for one in done.points), *stale], there


def _differs(migration: Migration, old: Point, new: Point | None) -> bool:
    """Tell whether a point is missing in the new collection, or out of date there."""
    if new is None or old.digest() != new.digest():
        return True
    mine, theirs = old.others or {}, new.others or {}
    for name, kind in migration.old.others.items():
        if not is_copy(mine.get(name), theirs.get(name), kind):
            return True
    if not reads_vectors(migration):
        return False  # its vector follows from its text, which is in the payload
    if migration.regime.copies and migration.vector_error(old) is None:
        (expected,) = derive([old.vector or b""], migration.model.dimensions)
        return not is_copy(expected, new.vector, migration.old.kind)
    has_source = old.vector is not None or migration.rule.text(old.payload) is not None
    return (new.vector is not None) != has_source


async def _delete_orphans(migration: Migration) -> list[PointId]:
    """Delete points that the old collection does not have any more; return them."""
    state = migration.state
    orphans: list[PointId] = []
    async for page in migration.points.pages(state.target, migration.pace.page):
        ids = [point.id for point in page.points]
        there = await migration.points.get_points(state.source, ids)
        missing = [one for one in ids if one not in there]
        await migration.points.delete(state.target, missing)
        orphans += missing
    state.counts.deleted += len(orphans)
    return orphans

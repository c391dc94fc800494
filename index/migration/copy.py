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
"""Points that cannot be carried: the digest of their payload at that time, and the reason."""


@dataclass(slots=True)
class CarryResult:
    """The result of carrying some points."""

    points: list[Point] = field(default_factory=list)
    """The points to write, with their new vectors."""
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

    A point without a text and without an old vector gets no new vector. Its payload and its other
    vectors are carried.
    """
    result = CarryResult()
    texts: list[tuple[Point, str]] = []
    textless: list[tuple[Point, str]] = []
    for point in points:
        wrong = migration.vector_error(point) if migration.regime.copies else "not looked at"
        if wrong is None:
            (new,) = derive([point.vector or b""], migration.model.dimensions)
            result.points.append(point.with_vector(new))
        elif (text := migration.rule.text(point.payload)) is not None:
            texts.append((point, text))
        else:
            textless.append((point, wrong))
    bare = await _without_vector(migration, [point for point, _ in textless])
    for point, wrong in textless:
        if point.id in bare:
            result.points.append(point)
            result.without_vector += 1
            continue
        why = f"no text: {_nothing_at(migration)}"
        if migration.regime.copies:
            why = f"the vector: {wrong}; {why}"
        result.letters.append(letter(point, why))
    answers = await migration.embedder.embed([text for _, text in texts])
    for (point, _), answer in zip(texts, answers, strict=True):
        if isinstance(answer, Rejection):
            result.letters.append(letter(point, answer.why))
        else:
            result.points.append(point.with_vector(answer))
            result.embedded += 1
    return result


async def _without_vector(migration: Migration, points: Sequence[Point]) -> set[PointId]:
    """Return the ids of the points without a vector to migrate."""
    if not reads_vectors(migration):
        ids = [point.id for point in points]
        sources = await migration.points.get_points(migration.state.source, ids, vectors=True)
        points = list(sources.values())
    return {point.id for point in points if point.vector is None}


def letter(point: Point, why: str) -> dict[str, Any]:
    """Return the dead letter of a point; it holds nothing of its payload."""
    return {"id": point.id, "why": why}


def _nothing_at(migration: Migration) -> str:
    if not migration.rule.fields:
        return f"{migration.rule.source} gives none"
    return f"nothing at {', '.join(f'`{name}`' for name in migration.rule.fields)}"


async def verify_sample(migration: Migration, min_cosine: float) -> None:
    """Embed sampled texts without the cache, and compare them with the old vectors.

    Raises MigrationRefused if one differs. Nothing has been copied then.
    """
    state, width = migration.state, migration.model.dimensions
    if not migration.regime.copies or state.proof is not None:
        return
    drawn = await migration.points.sample(state.source, 4 * migration.pace.sample)
    sound = [point for point in drawn if migration.vector_error(point) is None]
    able = [
        (point, text) for point in sound if (text := migration.rule.text(point.payload)) is not None
    ]
    able = able[: migration.pace.sample]
    if not able:
        if await migration.points.count(state.source):
            raise MigrationRefused(
                f"{state.source}: none of {len(drawn)} sampled points has a text at"
                f" {state.rule} and a sound vector: nothing proves that vectors may be copied"
            )
        return
    answers = await migration.embedder.embed([text for _, text in able], anew=True)
    pairs = zip((point for point, _ in able), answers, strict=True)
    vector_pairs = [(point, new) for point, new in pairs if not isinstance(new, Rejection)]
    cosines = [
        vector.cosine(derive([point.vector or b""], width)[0], new) for point, new in vector_pairs
    ]
    if not vector_pairs:
        raise MigrationRefused(f"{state.model} takes none of the sampled texts")
    off = sum(cosine < min_cosine for cosine in cosines)
    migration.save()
    if off:
        raise MigrationRefused(
            f"{off} of {len(vector_pairs)} sampled texts of {state.source} have other vectors in"
            f" {state.model} (cosine {min(cosines):.3f}, wanted {min_cosine}): these vectors are"
            f" not of this model and this text ({state.rule}); --regime reembed buys them"
        )
    state.proof = min(cosines)
    state.proved = [point.id for point, _ in vector_pairs]
    migration.save()


async def copy(migration: Migration) -> None:
    """Carry the old points in the order of their ids, from the checkpoint on.

    A point that the new collection already has is not embedded or written again. Raises
    QdrantFailure, EmbeddingError, MigrationStateError.
    """
    state, pace = migration.state, migration.pace
    if state.first_pass_done:
        return

    async def work(page: Page) -> CarryResult:
        ids = [point.id for point in page.points]
        targets = await migration.points.get_points(state.target, ids)
        return await carry(migration, [point for point in page.points if point.id not in targets])

    total, size = await migration.points.count(state.source), migration.pace.page
    with migration.progress(f"copying {state.collection}", total) as tell:
        tell(state.counts.points)
        pages = migration.points.pages(
            state.source, size, state.offset, vectors=reads_vectors(migration)
        )
        async with contextlib.aclosing(map_concurrently(pages, work, pace.ahead)) as carried:
            async for page, result in carried:
                await _write_page(migration, page, result)
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


async def _write_page(migration: Migration, page: Page, result: CarryResult) -> None:
    """Write a page, then the checkpoint after it."""
    state, counts = migration.state, migration.state.counts
    await migration.points.write(state.target, result.points, "insert_only")
    migration.state_file.append_dead_letters(result.letters)
    counts.points += len(page.points)
    result.add_to(counts)
    counts.dead += len(result.letters)
    state.offset, state.first_pass_done = page.after, page.after is None
    migration.save()


def reads_vectors(migration: Migration) -> bool:
    """Tell whether the old vectors are read: to copy them, or other vectors of the points."""
    return migration.regime.copies or bool(migration.old.others)


def is_little(migration: Migration, repaired: int) -> bool:
    """Tell whether so few points differed in a pass that the cutover can carry the rest.

    If clients write all the time, another whole pass finds as many again.
    """
    return repaired <= max(migration.pace.page, migration.state.counts.points // 100)


async def follow(migration: Migration) -> None:
    """Compare both collections and repair the new one, until a pass finds few differences.

    The cutover carries later writes. Raises MigrationRefused if the old one
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
    """Make the new collection equal to the old one; return the number of repaired points.

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
            changed_ids, targets = await _repair(migration, page.points, refused, letters)
            repaired += len(changed_ids)
            if snapshot is not None:
                await _store_snapshot(migration, snapshot, page.points, changed_ids, targets)
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


async def _store_snapshot(
    migration: Migration,
    snapshot: Snapshot,
    points: Sequence[Point],
    changed_ids: Sequence[PointId],
    targets: dict[PointId, Point],
) -> None:
    """Store points in the snapshot, in the present state of both collections."""
    rewritten = await migration.points.get_points(
        migration.state.target, changed_ids, vectors=reads_vectors(migration)
    )
    new = {id_: point for id_, point in targets.items() if id_ not in changed_ids} | rewritten
    rule = migration.rule
    snapshot.add(
        points, new, {point.id for point in points if rule.text(point.payload) is not None}
    )


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
    targets = await migration.points.get_points(state.target, ids, vectors=reads_vectors(migration))
    wrong = [point for point in points if _differs(migration, point, targets.get(point.id))]
    rejected = {
        point.id: point for point in wrong if refused.get(point.id, (b"",))[0] == point.digest()
    }
    letters += [letter(point, refused[point.id][1]) for point in rejected.values()]
    candidates = {point.id: point for point in wrong if point.id not in rejected}
    result = await carry(migration, list(candidates.values()))
    letters += result.letters
    for dead_letter in result.letters:
        refused[dead_letter["id"]] = (candidates[dead_letter["id"]].digest(), dead_letter["why"])
    await migration.points.write(state.target, result.points)
    # A search must not find a point by its old vector if it has no new one.
    stale = [dead_letter["id"] for dead_letter in result.letters if dead_letter["id"] in targets]
    await migration.points.delete(state.target, stale)
    result.add_to(counts)
    counts.updated += sum(point.id in targets for point in result.points)
    counts.deleted += len(stale)
    return [*(point.id for point in result.points), *stale], targets


def _differs(migration: Migration, old: Point, new: Point | None) -> bool:
    """Tell whether the new collection lacks a point, or has an older version of it."""
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
    """Delete points that the old collection no longer has; return their ids."""
    state = migration.state
    orphans: list[PointId] = []
    async for page in migration.points.pages(state.target, migration.pace.page):
        ids = [point.id for point in page.points]
        sources = await migration.points.get_points(state.source, ids)
        orphan_ids = [id_ for id_ in ids if id_ not in sources]
        await migration.points.delete(state.target, orphan_ids)
        orphans += orphan_ids
    state.counts.deleted += len(orphans)
    return orphans

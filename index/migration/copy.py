"""The passes of a migration: points of the old collection become points of the new one.

Where vectors are copied, sampled texts prove before that they may be: what is known may be wrong.

A point is written with a sound vector of the new model, or not at all: then a dead letter says why.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from embedding_proxy.index.collection_reader import Page, Point, PointId
from embedding_proxy.providers import vector

from .embedding import Refused
from .runner import Migration, MigrationRefused
from .snapshot import Snapshot
from .state import Phase

T = TypeVar("T")
R = TypeVar("R")

Refusals = dict[PointId, tuple[bytes, str]]
"""Points that cannot be carried: the digest of their payload then, and why."""

SAME_NUMBERS = 0.99999
"""The least cosine of a copied vector and its copy: servers normalise what they store anew."""


@dataclass(slots=True)
class Carried:
    """What becomes of some points."""

    points: list[Point] = field(default_factory=list)
    """With their new vectors."""
    embedded: int = 0
    letters: list[dict[str, Any]] = field(default_factory=list)


async def carry(migration: Migration, points: Sequence[Point]) -> Carried:
    """Give each point its new vector, or a dead letter. Raises EmbeddingError."""
    done = Carried()
    texts: list[tuple[Point, str]] = []
    for point in points:
        wrong = migration.oddity(point) if migration.regime.copies else "not looked at"
        if wrong is None:
            (new,) = vector.derive([point.vector or b""], migration.model.dimensions)
            done.points.append(point.with_vector(new))
        elif (text := migration.rule.text(point.payload)) is not None:
            texts.append((point, text))
        else:
            why = f"no text: {_nothing_at(migration)}"
            if migration.regime.copies:
                why = f"the vector: {wrong}; {why}"
            done.letters.append(letter(point, why))
    answers = await migration.patient.embed([text for _, text in texts])
    for (point, _), answer in zip(texts, answers, strict=True):
        if isinstance(answer, Refused):
            done.letters.append(letter(point, answer.why))
        else:
            done.points.append(point.with_vector(answer))
            done.embedded += 1
    return done


def letter(point: Point, why: str) -> dict[str, Any]:
    """Return the dead letter of a point; it holds nothing of its payload."""
    return {"id": point.id, "why": why}


def _nothing_at(migration: Migration) -> str:
    if not migration.rule.fields:
        return f"{migration.rule.source} gives none"
    return f"nothing at {', '.join(f'`{name}`' for name in migration.rule.fields)}"


async def prove(migration: Migration, least: float) -> None:
    """Embed sampled texts, past the cache, and compare them with the old vectors.

    Raises MigrationRefused if one differs: then nothing has been copied.
    """
    state, width = migration.state, migration.model.dimensions
    if not migration.regime.copies or state.proof is not None:
        return
    drawn = await migration.points.sample(state.source, 4 * migration.pace.sample)
    sound = [one for one in drawn if migration.oddity(one) is None]
    able = [(one, text) for one in sound if (text := migration.rule.text(one.payload)) is not None]
    able = able[: migration.pace.sample]
    if not able:
        if await migration.points.count(state.source):
            raise MigrationRefused(
                f"{state.source}: none of {len(drawn)} sampled points has a text at"
                f" {state.rule} and a sound vector: nothing proves that vectors may be copied"
            )
        return
    answers = await migration.patient.embed([text for _, text in able], anew=True)
    pairs = zip((one for one, _ in able), answers, strict=True)
    there = [(one, new) for one, new in pairs if not isinstance(new, Refused)]
    cosines = [
        vector.cosine(vector.derive([one.vector or b""], width)[0], new) for one, new in there
    ]
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
    QdrantFailure, EmbeddingError, JournalError.
    """
    state, pace = migration.state, migration.pace
    if state.first_pass_done:
        return

    async def work(page: Page) -> Carried:
        ids = [point.id for point in page.points]
        there = await migration.points.those(state.target, ids)
        return await carry(migration, [one for one in page.points if one.id not in there])

    total, size = await migration.points.count(state.source), migration.pace.page
    with migration.progress(f"copying {state.collection}", total) as tell:
        tell(state.counts.points)
        pages = migration.points.pages(
            state.source, size, state.offset, vectors=reads_vectors(migration)
        )
        async with contextlib.aclosing(ahead(pages, work, pace.ahead)) as carried:
            async for page, done in carried:
                await _land(migration, page, done)
                tell(state.counts.points)
                if pace.points_per_second:
                    await migration.sleep(len(page.points) / pace.points_per_second)
    # An empty collection has no page.
    state.first_pass_done = True
    migration.save()


async def ahead(
    items: AsyncIterator[T], work: Callable[[T], Awaitable[R]], most: int
) -> AsyncGenerator[tuple[T, R]]:
    """Yield items and what their work gives, in order; that of several items is done at a time."""
    begun: deque[tuple[T, asyncio.Future[R]]] = deque()
    try:
        async for item in items:
            begun.append((item, asyncio.ensure_future(work(item))))
            if len(begun) >= most:
                first, doing = begun[0]
                result = await doing
                begun.popleft()
                yield first, result
        while begun:
            first, doing = begun[0]
            result = await doing
            begun.popleft()
            yield first, result
    finally:
        for _, doing in begun:
            doing.cancel()
        for _, doing in begun:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await doing


async def _land(migration: Migration, page: Page, done: Carried) -> None:
    """Write a page; the checkpoint follows what it speaks of, once that is on the medium."""
    state, counts = migration.state, migration.state.counts
    await migration.points.write(state.target, done.points, only_new=True)
    migration.journal.bury(done.letters)
    counts.points += len(page.points)
    counts.embedded += done.embedded
    counts.copied += len(done.points) - done.embedded
    counts.dead += len(done.letters)
    state.offset, state.first_pass_done = page.after, page.after is None
    migration.save()


def reads_vectors(migration: Migration) -> bool:
    """Tell whether the old vectors are of use: to copy one, or others beside it."""
    return migration.regime.copies or migration.old.others


async def follow(migration: Migration) -> None:
    """Compare both collections and mend the new one, until a pass finds nothing to mend.

    Raises MigrationRefused if the old one changes faster than it can be followed.
    """
    state = migration.state
    refused: Refusals = {}
    for number in range(1, migration.pace.passes + 1):
        if not await compare(migration, refused, f"comparing {state.collection}, pass {number}"):
            state.phase = Phase.COPIED
            migration.save()
            return
    raise MigrationRefused(
        f"{state.source} still changes after {migration.pace.passes} passes: run it again when"
        " fewer writes arrive, or give more --passes"
    )


async def compare(
    migration: Migration, refused: Refusals, title: str, seen: Snapshot | None = None
) -> int:
    """Make the new collection equal to the old; return how many points had to be mended.

    What is in `refused` is not asked for again, and what is refused is added to it. The dead
    letters are written anew from what is found. `seen` is told of all that the old collection has.
    """
    state, counts = migration.state, migration.state.counts
    total, size = await migration.points.count(state.source), migration.pace.page
    letters: list[dict[str, Any]] = []
    number = mended = 0
    with migration.progress(title, total) as tell:
        async for page in migration.points.pages(
            state.source, size, vectors=reads_vectors(migration)
        ):
            known = len(letters)
            mended += await _mend(migration, page.points, refused, letters)
            if seen is not None:
                seen.add(page.points, {one["id"] for one in letters[known:]})
            number += len(page.points)
            tell(number)
        mended += await _delete_what_is_gone(migration)
    migration.journal.bury(letters, anew=True)
    counts.points, counts.dead = number, len(letters)
    migration.save()
    return mended


async def _mend(
    migration: Migration,
    points: Sequence[Point],
    refused: Refusals,
    letters: list[dict[str, Any]],
) -> int:
    """Write the points that are missing or differ; return how many."""
    state, counts = migration.state, migration.state.counts
    ids = [point.id for point in points]
    there = await migration.points.those(state.target, ids, vectors=migration.regime.copies)
    wrong = [one for one in points if _differs(migration, one, there.get(one.id))]
    known = {one.id for one in wrong if refused.get(one.id, (b"",))[0] == one.digest()}
    letters += [letter(one, refused[one.id][1]) for one in wrong if one.id in known]
    asked = {one.id: one for one in wrong if one.id not in known}
    done = await carry(migration, list(asked.values()))
    letters += done.letters
    for found in done.letters:
        refused[found["id"]] = (asked[found["id"]].digest(), found["why"])
    await migration.points.write(state.target, done.points)
    # What has no vector any more must not be found by its old one.
    stale = [found["id"] for found in done.letters if found["id"] in there]
    await migration.points.delete(state.target, stale)
    counts.embedded += done.embedded
    counts.copied += len(done.points) - done.embedded
    counts.updated += sum(one.id in there for one in done.points)
    counts.deleted += len(stale)
    return len(done.points) + len(stale)


def _differs(migration: Migration, old: Point, new: Point | None) -> bool:
    """Tell whether a point is missing in the new collection, or is there as it was before."""
    if new is None or old.digest() != new.digest():
        return True
    if not migration.regime.copies or migration.oddity(old) is not None:
        return False  # its vector is that of its text, which is in the payload
    (expected,) = vector.derive([old.vector or b""], migration.model.dimensions)
    return new.vector is None or vector.cosine(expected, new.vector) < SAME_NUMBERS


async def _delete_what_is_gone(migration: Migration) -> int:
    """Delete points whose old one is not there any more; return how many."""
    state, gone = migration.state, 0
    async for page in migration.points.pages(state.target, migration.pace.page):
        ids = [point.id for point in page.points]
        there = await migration.points.those(state.source, ids)
        missing = [one for one in ids if one not in there]
        await migration.points.delete(state.target, missing)
        gone += len(missing)
    state.counts.deleted += gone
    return gone

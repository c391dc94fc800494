"""Compares the journal with Qdrant, and queues the points that are missing, with cached vectors.

Somebody deleted points or a collection, or restored an old snapshot: the journal of the outbox has
what makes the points anew, ids and payloads included, and the cache has their vectors. A point
whose vector is not in the cache any more is indexed by the next answer with it.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from embedding_proxy.providers.base import Vector

from .collection import AnyConnection, CollectionNames, Provenance, present_ids, state_of
from .outbox import OnDisk, Outbox
from .point import JournalEntry, Point, Target, id_of

COMPARED = 1000
"""Points whose presence is asked for in one call."""

Lookup = Callable[[Sequence[JournalEntry], int], Sequence[Vector | None]]
"""Returns the vectors of entries at a width; None for those that are not in the cache."""


@dataclass(slots=True)
class Comparison:
    """What came of comparing one collection."""

    collection: str
    missing: int = 0
    """Points of the journal that the collection does not have."""
    queued: int = 0
    """Those that will be sent."""
    unknown: int = 0
    """Those of which the cache has no vector, or the journal no payload."""
    exists: bool = True
    """Whether the collection is there; if not, it is compared only where it is named."""


async def resync(  # noqa: PLR0913 - by name
    qdrant: AnyConnection,
    on_disk: OnDisk,
    names: CollectionNames,
    lookup: Lookup,
    *,
    collection: str | None = None,
    dry_run: bool = False,
) -> AsyncIterator[Comparison]:
    """Yield what came of each collection, or of the named one. Raises QdrantFailure, FAILURES.

    `collection` is the name that answers are indexed under, or that of the collection they are in.
    """
    for target in await on_disk(Outbox.journal_targets):
        wanted = Provenance(target.space, target.dimensions)
        name = await names.locate(qdrant, target.collection, wanted)
        if collection not in (None, name, target.collection):
            continue
        found = Comparison(name)
        if collection is None and await state_of(qdrant, name) is None:
            # Somebody deleted it, and may have meant it.
            found.exists = False
            yield found
            continue
        async for gone in missing_points(qdrant, on_disk, target, name):
            found.missing += len(gone)
            points = list(_points(gone, lookup(gone, target.dimensions)))
            found.queued += len(points)
            found.unknown += len(gone) - len(points)
            if not dry_run:
                await on_disk(partial(_queue, target=target, gone=gone, points=points))
        yield found


def _points(entries: Sequence[JournalEntry], vectors: Sequence[Vector | None]) -> list[Point]:
    points = []
    for entry, vector in zip(entries, vectors, strict=True):
        payload = entry.payload
        if vector is None or payload is None:
            continue
        points.append(
            Point(
                entry.point,
                vector,
                payload,
                plain=entry.point == entry.address,
                new=True,
                address=entry.address,
                namespace=entry.namespace,
                digest=entry.digest or b"",
                vectors=entry.vectors,
                is_update=entry.is_update,
            )
        )
    return points


def _queue(
    outbox: Outbox, *, target: Target, gone: Sequence[JournalEntry], points: Sequence[Point]
) -> None:
    outbox.forget(target, [one.point for one in gone])
    outbox.add(target, points)


async def missing_points(
    qdrant: AnyConnection, on_disk: OnDisk, target: Target, name: str
) -> AsyncIterator[list[JournalEntry]]:
    """Yield the points of the journal that a collection does not have. Raises QdrantFailure.

    `name` may be of a collection that is not there; then it has none.
    """
    after = b""
    while True:
        entries = await on_disk(lambda outbox, after=after: outbox.journal(target, after, COMPARED))  # type: ignore[misc]
        if not entries:
            return
        after = entries[-1].point
        there = await present_ids(qdrant, name, [id_of(one.point) for one in entries])
        gone = [one for one in entries if id_of(one.point) not in there]
        if gone:
            yield gone

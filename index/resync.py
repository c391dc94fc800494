"""Compares the journal with Qdrant, and queues the points that are missing, with cached vectors.

Points are missing if another program deleted them or their collection, or restored an old snapshot.
The journal of the outbox has their ids and payloads, and the cache has their vectors. If the cache
no longer has a vector, the next answer with it indexes the point.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from embedding_proxy.providers.base import Vector

from .collection import AnyConnection, CollectionNames, Provenance, present_ids, state_of
from .outbox import OnDisk, Outbox
from .point import JournalEntry, Point, Target, id_of

COMPARED = 1000
"""Points that one call looks up."""

Lookup = Callable[[Sequence[JournalEntry], int], Sequence[Vector | None]]
"""Returns the vectors of entries at a width; None for those that are not in the cache."""


@dataclass(slots=True)
class Comparison:
    """The result of the comparison of one collection."""

    collection: str
    missing: int = 0
    """Points of the journal that the collection does not have."""
    queued: int = 0
    """Those that will be sent."""
    unknown: int = 0
    """Those without a vector in the cache, or a payload in the journal."""
    exists: bool = True
    """Whether the collection exists. A missing one is compared only if it is named."""


async def resync(  # noqa: PLR0913 - by name
    qdrant: AnyConnection,
    on_disk: OnDisk,
    names: CollectionNames,
    lookup: Lookup,
    *,
    collection: str | None = None,
    dry_run: bool = False,
) -> AsyncIterator[Comparison]:
    """Yield the result of each collection, or of the named one. Raises QdrantFailure, FAILURES.

    `collection` is the name that answers are indexed under, or that of the collection they are in.
    """
    for target in await on_disk(Outbox.journal_targets):
        provenance = Provenance(target.space, target.dimensions)
        name = await names.locate(qdrant, target.collection, provenance)
        if collection not in (None, name, target.collection):
            continue
        comparison = Comparison(name)
        if collection is None and await state_of(qdrant, name) is None:
            # Somebody deleted it, perhaps on purpose.
            comparison.exists = False
            yield comparison
            continue
        async for missing in missing_points(qdrant, on_disk, target, name):
            comparison.missing += len(missing)
            points = list(_points(missing, lookup(missing, target.dimensions)))
            comparison.queued += len(points)
            comparison.unknown += len(missing) - len(points)
            if not dry_run:
                await on_disk(partial(_queue, target=target, missing=missing, points=points))
        yield comparison


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
    outbox: Outbox, *, target: Target, missing: Sequence[JournalEntry], points: Sequence[Point]
) -> None:
    outbox.forget(target, [entry.point for entry in missing])
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
        ids = await present_ids(qdrant, name, [id_of(entry.point) for entry in entries])
        missing = [entry for entry in entries if id_of(entry.point) not in ids]
        if missing:
            yield missing

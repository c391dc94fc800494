"""Verifies the new collection: counts, contents, sampled vectors, and searches as users do them."""

from dataclasses import dataclass, field

from embedding_proxy.index.collection_reader import Point
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Vector

from .copy import Refusals, compare, is_little
from .embedding import Rejection
from .runner import Migration
from .snapshot import Snapshot

RECALLED_AMONG = 10
"""A search with a point's own vector must find the point among this number of results."""
TWINS = 0.99999
"""From this cosine on, a search may return either of two points first."""
_UNIT = 0.01


@dataclass(slots=True)
class CatchUp:
    """The result of carrying late changes."""

    written: int = 0
    """Points written to the new collection."""
    deleted: int = 0
    left: int = 0
    """Points that were not carried, because clients have changed them in the new collection."""
    dead: int = 0
    """Points that cannot be carried; the dead letters say why."""
    quiet: bool = False
    """Whether the last pass over the old collection found no late change."""


@dataclass(slots=True)
class Verdict:
    """The result of a verification."""

    verified: bool = False
    """False if an interrupted cutover had done it before."""
    old_points: int = 0
    new_points: int = 0
    dead: int = 0
    """Points of the old collection that the new one lacks, with a reason."""
    differing: int = 0
    """Points that the last comparison of ids and payloads repaired."""
    sampled: int = 0
    cosine: float | None = None
    """The smallest cosine between a stored vector and its text embedded again."""
    recalled: int = 0
    """Sampled points that a search with their own vector found."""
    late: CatchUp | None = None
    """Changes of the old collection while the aliases were switched."""
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether there is no problem. Dead letters are no problem."""
        return not self.problems


async def verify(migration: Migration, min_cosine: float, snapshot: Snapshot) -> Verdict:
    """Compare once more, then check counts, sampled vectors and searches.

    `snapshot` receives the state of both collections in the last comparison. Later writes are
    carried after the switch. Raises QdrantFailure, EmbeddingError.
    """
    state, points = migration.state, migration.points
    verdict = Verdict(verified=True)
    refused: Refusals = {}
    for number in range(1, migration.pace.passes + 1):
        snapshot.reset()
        title = f"verifying {state.collection}, pass {number}"
        verdict.differing = await compare(migration, refused, title, snapshot)
        if is_little(migration, verdict.differing):
            break
    else:
        verdict.problems.append(
            f"{state.source} changes faster than it can be followed:"
            f" {verdict.differing:,} points in the last pass"
        )
    verdict.old_points, carried = snapshot.counts()
    verdict.new_points = await points.count(state.target)
    verdict.dead = state.counts.dead
    # The proxy may have written more to both since.
    if verdict.new_points < carried or (verdict.new_points > carried and not state.dual_write):
        verdict.problems.append(
            f"{verdict.new_points:,} points in {state.target}, and not the {carried:,} that were"
            f" carried from {state.source}"
        )
    sample = await _sample(migration, snapshot)
    verdict.sampled = len(sample)
    await _embed_again(migration, sample, min_cosine, verdict)
    await _search(migration, sample, verdict)
    if verdict.old_points and not sample:
        verdict.problems.append(
            f"nothing of {state.source} could be looked at: no vector in {state.target} can be"
            " compared with a text"
        )
    return verdict


async def _sample(migration: Migration, snapshot: Snapshot) -> list[Point]:
    """Return points of the new collection, with their vectors.

    Where vectors were copied, these are the points whose texts were bought for the sample.
    """
    state, points = migration.state, migration.points
    drawn = snapshot.draw(migration.pace.sample, with_text=not migration.regime.copies)
    for ids in (state.proved, drawn):
        candidates = await points.get_points(state.target, ids, vectors=True)
        if sample := [point for point in candidates.values() if point.vector is not None]:
            return sample
    return []


async def _embed_again(
    migration: Migration, sample: list[Point], min_cosine: float, verdict: Verdict
) -> None:
    """Compare stored vectors with those of their texts, which are in the cache."""
    texts = [(point, text) for point in sample if (text := migration.rule.text(point.payload))]
    answers = await migration.embedder.embed([text for _, text in texts])
    migration.save()
    cosines = []
    for (point, _), answer in zip(texts, answers, strict=True):
        if isinstance(answer, Rejection):
            continue
        cosine = _cosine(point.vector, answer)
        cosines.append(cosine)
        if cosine < min_cosine:
            verdict.problems.append(
                f"point {point.id} of {migration.state.target} has another vector than its text"
                f" (cosine {cosine:.3f}, wanted {min_cosine})"
            )
    verdict.cosine = min(cosines, default=None)


async def _search(migration: Migration, sample: list[Point], verdict: Verdict) -> None:
    target = migration.state.target
    for point in sample:
        assert point.vector is not None  # noqa: S101 - no others are drawn
        neighbours = await migration.points.nearest(target, point.vector, RECALLED_AMONG)
        if any(_is_it(neighbour, point) for neighbour in neighbours):
            verdict.recalled += 1
        elif _should_be_found(migration, point.vector):
            verdict.problems.append(f"a search in {target} for point {point.id} does not find it")


def _is_it(neighbour: Point, point: Point) -> bool:
    """Tell whether this is the point, or one that a search cannot distinguish from it."""
    return neighbour.id == point.id or _cosine(neighbour.vector, point.vector) >= TWINS


def _should_be_found(migration: Migration, own: Vector) -> bool:
    """Tell whether a vector is nearest to itself. By dot product a longer one may be nearer."""
    return migration.old.distance != "Dot" or abs(vector.length(own) - 1) < _UNIT


def _cosine(first: Vector | None, second: Vector | None) -> float:
    return -1.0 if first is None or second is None else vector.cosine(first, second)

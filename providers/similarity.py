"""Similarity of vectors: text by text within one space, by neighbours across spaces.

Pure measures: vectors in, numbers out, computed in float64.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from .base import Vector
from .vector import Floats, stack

# Rows whose similarities to all others are held at a time.
_BLOCK = 256


def cosines(one: Sequence[Vector], other: Sequence[Vector]) -> tuple[float, float]:
    """Return the least and the mean cosine between two models' vectors of the same n >= 1 texts.

    Both are of one width.
    """
    each = np.sum(_units(one) * _units(other), axis=1)
    return float(each.min()), float(each.mean())


def similarities(rows: Sequence[Vector], columns: Sequence[Vector]) -> Floats:
    """Return the cosine of each row's vector with each column's, shape (rows, columns).

    All are of one space and width.
    """
    alike = np.clip(_units(rows) @ _units(columns).T, -1.0, 1.0)
    return alike.astype(np.float32)


def ranked(query: Vector, vectors: Sequence[Vector], k: int) -> list[tuple[int, float]]:
    """Return the places of the k vectors nearest to one, with their cosines.

    The nearest first; of equals the earlier. All are of one space and width.
    """
    if not vectors or k < 1:
        return []
    (alike,) = np.clip(_units([query]) @ _units(vectors).T, -1.0, 1.0)
    return [(int(index), float(alike[index])) for index in np.argsort(-alike, kind="stable")[:k]]


def nearest(vectors: Sequence[Vector], of: Sequence[int], among: int, k: int) -> list[list[int]]:
    """Return, for each place in `of`, the places of its k nearest among the first `among` vectors.

    The nearest first, by cosine; of equals the earlier. None is its own neighbour. There are k
    others at least.
    """
    units = _units(vectors)
    neighbours: list[list[int]] = []
    for start in range(0, len(of), _BLOCK):
        rows = np.array(of[start : start + _BLOCK])
        alike = units[rows] @ units[:among].T
        itself = np.flatnonzero(rows < among)
        alike[itself, rows[itself]] = -np.inf
        neighbours += np.argsort(-alike, axis=1, kind="stable")[:, :k].tolist()
    return neighbours


def overlap(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Return which share of the neighbours in one space are neighbours in the other, 0...1.

    >>> overlap([[1, 2], [0, 2]], [[2, 1], [2, 3]])
    0.75
    """
    shares = [len({*a} & {*b}) / len(a) for a, b in zip(one, other, strict=True)]
    return math.fsum(shares) / len(shares)


def recall(found: Sequence[Collection[int]], wanted: Sequence[Collection[int]]) -> float:
    """Return the mean share of what was wanted that was found, 0...1; something is wanted by each.

    >>> recall([[1, 2], [3, 4]], [{1, 9}, {4}])
    0.75
    """
    shares = [len({*a} & {*b}) / len(b) for a, b in zip(found, wanted, strict=True)]
    return math.fsum(shares) / len(shares)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least of some values that so many percent of them do not exceed (nearest rank).

    >>> percentile([4, 1, 3, 2], 50), percentile([4, 1, 3, 2], 95)
    (2, 4)
    """
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


def _units(vectors: Sequence[Vector]) -> npt.NDArray[np.float64]:
    """Return the vectors at length 1, shape (n, dimensions)."""
    numbers = stack(vectors).astype(np.float64)
    units: npt.NDArray[np.float64] = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    return units

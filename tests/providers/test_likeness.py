"""How alike vectors are, on vectors small enough to see it."""

import numpy as np
import pytest
from embedding_proxy.providers.similarity import cosines, nearest, overlap, percentile, recall


def _vectors(*rows):
    return [np.array(row, dtype="<f4").tobytes() for row in rows]


def test_cosines_are_the_least_and_the_mean_whatever_the_lengths():
    """Each text is compared with itself alone, and lengths do not matter."""
    one = _vectors([1, 0], [0, 2], [3, 4])
    other = _vectors([5, 0], [1, 0], [6, 8])
    least, mean = cosines(one, other)
    assert least == pytest.approx(0, abs=1e-12)
    assert mean == pytest.approx(2 / 3)


def test_the_nearest_come_in_order_without_the_one_that_asks():
    """By cosine and not by length, the earlier of equals first, only among those searched."""
    vectors = _vectors([1, 0], [9, 1], [0, 1], [9, 1], [1, 0.01])
    assert nearest(vectors, [0, 2, 4], among=4, k=3) == [[1, 3, 2], [1, 3, 0], [0, 1, 3]]


def test_many_places_are_asked_block_by_block():
    """No row is lost or mixed up where the work is divided."""
    angles = np.arange(600) / 600
    vectors = _vectors(*zip(np.cos(angles), np.sin(angles), strict=True))
    found = nearest(vectors, range(600), among=600, k=2)
    assert found[0] == [1, 2]
    assert found[599] == [598, 597]
    assert all({*found[i]} == {i - 1, i + 1} for i in range(1, 599))


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [([[1, 2]], [[2, 1]], 1), ([[1, 2]], [[3, 4]], 0), ([[1, 2], [0, 2]], [[1, 9], [0, 2]], 0.75)],
)
def test_overlap_is_what_is_shared_whatever_the_order(one, other, share):
    """The mean share of common neighbours."""
    assert overlap(one, other) == share


def test_recall_is_the_mean_share_of_what_was_wanted():
    """A query with several right texts counts as much as one with a single one."""
    assert recall([[1, 2], [3, 4], [5]], [{1, 9}, {4}, {6}]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 10), (95, 19), (96, 20), (100, 20), (1, 1), (0, 1)]
)
def test_a_percentile_is_a_value_that_was_measured(percent, value):
    """The nearest rank, in whatever order the values come."""
    assert percentile([*range(20, 0, -1)], percent) == value

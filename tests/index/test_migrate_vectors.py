"""Vectors in each form that Qdrant has: their digests, and copies of them; and dual writes."""

import numpy as np
import pytest
from embedding_proxy.index.migration import points
from embedding_proxy.index.migration.points import VectorType, vector_digest
from embedding_proxy.index.migration.state import DualWriteStates, MigrationState, Phase, State
from hypothesis import given
from hypothesis import strategies as st
from qdrant_client import models

FLOATS = VectorType()
COSINE = VectorType(is_cosine=True)
HALVES = VectorType("float16", is_cosine=True)
BYTES = VectorType("uint8")
NUMBERS = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8)


def _sparse(**values):
    return models.SparseVector(
        indices=[int(one[1:]) for one in values], values=list(values.values())
    )


@pytest.mark.parametrize(
    ("one", "other", "kind", "is_copy"),
    [
        ([1.0, 2.0], [1.0, 2.0], FLOATS, True),
        ([1.0, 2.0], [1.0, 2.001], FLOATS, False),
        ([1.0, 2.0], [2.0, 4.0], FLOATS, False),  # As long as it was, not only as directed.
        ([3.0, 4.0], [0.6, 0.8], COSINE, True),
        ([0.6, 0.8], [0.6001, 0.7999], COSINE, False),
        ([0.6, 0.8], [0.60009766, 0.79980469], HALVES, True),
        ([0.6, 0.8], [0.62, 0.78], HALVES, False),
        ([1.0, 255.0], [1.0, 255.0], BYTES, True),
        ([1.0, 255.0], [1.0, 254.0], BYTES, False),
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], COSINE, True),
        ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], COSINE, False),
        ([[1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]], COSINE, False),
        ([[1.0, 0.0]], [1.0, 0.0], COSINE, False),
        (_sparse(i1=0.5, i7=2.0), _sparse(i7=2.0, i1=0.5), FLOATS, True),
        (_sparse(i1=0.5), _sparse(i2=0.5), FLOATS, False),
        (_sparse(i1=0.5), _sparse(i1=0.5, i2=0.5), FLOATS, False),
        (_sparse(i1=0.5), _sparse(i1=0.6), FLOATS, False),
        (_sparse(i1=0.5), [0.5], FLOATS, False),
        (np.array([1, 2], "<f4").tobytes(), [1.0, 2.0], FLOATS, True),
        (None, None, FLOATS, True),
        (None, [1.0], FLOATS, False),
        ([0.0, 0.0], [0.0, 0.0], COSINE, True),
    ],
)
def test_a_copy_is_equal_within_what_its_type_holds(one, other, kind, is_copy):
    """In each form, both ways round."""
    assert points.is_copy(one, other, kind) is is_copy
    assert points.is_copy(other, one, kind) is is_copy


@given(NUMBERS, st.permutations(range(8)))
def test_the_order_of_a_sparse_vector_says_nothing(values, order):
    """Its digest is that of the same pairs in any order, and no other one's."""
    pairs = list(enumerate(values))
    mixed = [pairs[place] for place in order if place < len(pairs)]
    one, other = (
        models.SparseVector(indices=[i for i, _ in some], values=[v for _, v in some])
        for some in (pairs, mixed)
    )
    assert vector_digest(one) == vector_digest(other)
    assert vector_digest(one) != vector_digest(values)
    assert vector_digest([values]) != vector_digest(values)
    assert vector_digest(None) is None


# Dual writes


@pytest.mark.parametrize(
    ("phase", "collection", "partner"),
    [
        (Phase.COPYING, "docs", "new"),
        (Phase.COPIED, "docs", "new"),
        (Phase.ROLLED_BACK, "docs", "new"),
        (Phase.SWITCHING, "new", "docs"),
        (Phase.SWITCHED, "new", "docs"),
        (Phase.FINALIZED, None, None),
    ],
)
def test_what_is_written_twice_follows_the_phase(tmp_path, phase, collection, partner):
    """To the new collection until the cutover, then to the old one, until there is none."""
    state = State(
        "http://q:6333", "docs", "docs", "new", "", "m", "space/new", 8, "{text}", "reembed", "why",
        phase=phase, old_space="space/old", old_dimensions=16, dual_write=True, names=["live"],
    )  # fmt: skip
    journal = MigrationState(tmp_path, state.place, "docs")
    journal.save(state)
    states = DualWriteStates(tmp_path, "http://q:6333/")
    found = states.read()
    assert [(one.collection, one.partner) for one in found] == (
        [(collection, partner)] if collection else []
    )
    assert all("live" in one.aliases for one in found)
    # Of another server, damaged, or turned off: nothing is.
    assert list(DualWriteStates(tmp_path, "http://other:6333").read()) == []
    state.dual_write = False
    journal.save(state)
    assert list(states.read()) == []
    (tmp_path / "x--y.json").write_text("{")
    assert list(DualWriteStates(tmp_path, "http://q:6333").read()) == []
    assert list(DualWriteStates(tmp_path / "none", "http://q:6333").read()) == []

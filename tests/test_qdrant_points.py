"""The rules of a Qdrant server about vectors and snapshots that a migration relies on.

Asked of the simulated server, or of the one at QDRANT_URL.
"""

import numpy as np
import pytest
from embedding_proxy.index.client import Connection
from qdrant_client import models
from qdrant_server import QdrantServer

MULTI = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
VECTORS = {
    "text": models.VectorParams(size=2, distance="Cosine"),
    "tokens": models.VectorParams(size=2, distance="Cosine", multivector_config=MULTI),
    "half": models.VectorParams(size=2, distance="Dot", datatype=models.Datatype.FLOAT16),
}
WORDS = models.SparseVector(indices=[3, 9], values=[0.5, 2.0])
WHOLE = {"text": [0.6, 0.8], "tokens": [[1.0, 0.0], [3.0, 4.0]], "half": [0.1, 3.0], "words": WORDS}


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server, Connection(url=server.url) as connection:
        sparse = {"words": models.SparseVectorParams()}
        await connection.ask(
            lambda c: c.create_collection("hybrid", VECTORS, sparse_vectors_config=sparse)
        )
        yield connection


async def _put(qdrant, vector, one=1):
    point = models.PointStruct(id=one, vector=vector, payload={"n": one})
    await qdrant.ask(lambda client: client.upsert("hybrid", [point], wait=True))


async def _get(qdrant, one=1):
    (found,) = await qdrant.ask(
        lambda client: client.retrieve("hybrid", [one], with_vectors=True, with_payload=True)
    )
    return found


async def test_an_upsert_replaces_all_vectors_of_a_point(qdrant):
    """Those that it does not name are gone; a point may have any of them, or none."""
    await _put(qdrant, WHOLE)
    assert set((await _get(qdrant)).vector) == {"text", "tokens", "half", "words"}
    await _put(qdrant, {"words": WORDS})
    assert set((await _get(qdrant)).vector) == {"words"}
    await _put(qdrant, {})
    found = await _get(qdrant)
    assert (found.vector, found.payload) == ({}, {"n": 1})


async def test_one_vector_is_changed_or_deleted_and_the_others_stay(qdrant):
    """In each form; rows of a cosine multivector are scaled each for itself."""
    await _put(qdrant, WHOLE)
    other = models.SparseVector(indices=[1], values=[1.5])
    change = models.PointVectors(id=1, vector={"words": other, "tokens": [[0.0, 2.0]]})
    await qdrant.ask(lambda client: client.update_vectors("hybrid", [change]))
    found = (await _get(qdrant)).vector
    assert (found["words"], found["tokens"]) == (other, [[0.0, 1.0]])
    assert found["text"] == pytest.approx([0.6, 0.8])
    await qdrant.ask(lambda client: client.delete_vectors("hybrid", ["words", "text"], [1]))
    assert set((await _get(qdrant)).vector) == {"tokens", "half"}


async def test_a_vector_is_read_as_it_is_stored(qdrant):
    """Rounded to its type, in the order of its indices, and the same each time, also searched."""
    mixed = models.SparseVector(indices=[9, 3], values=[2.0, 0.5])
    await _put(qdrant, {**WHOLE, "words": mixed})
    first = (await _get(qdrant)).vector
    assert first["half"] == [float(np.float16(one)) for one in (0.1, 3.0)]
    assert (first["words"].indices, first["words"].values) == ([3, 9], [0.5, 2.0])
    assert first["tokens"][1] == pytest.approx([0.6, 0.8])
    await qdrant.ask(lambda client: client.query_points("hybrid", query=[1.0, 2.0], using="text"))
    assert (await _get(qdrant)).vector == first


async def test_points_that_exist_alone_are_updated(qdrant):
    """`update_only` makes no point anew that was deleted meanwhile."""
    await _put(qdrant, WHOLE)
    points = [
        models.PointStruct(id=one, vector={"text": [1.0, 0.0]}, payload={"new": True})
        for one in (1, 2)
    ]
    mode = models.UpdateMode.UPDATE_ONLY
    await qdrant.ask(lambda client: client.upsert("hybrid", points, wait=True, update_mode=mode))
    found, _ = await qdrant.ask(lambda client: client.scroll("hybrid", with_vectors=True))
    assert [(one.id, one.payload, one.vector) for one in found] == [
        (1, {"new": True}, {"text": [1.0, 0.0]})
    ]


async def test_a_snapshot_is_listed_once_it_is_made(qdrant):
    """A call that does not wait is followed by a name in the list."""
    assert await qdrant.ask(lambda client: client.list_snapshots("hybrid")) == []
    made = await qdrant.ask(lambda client: client.create_snapshot("hybrid", wait=True))
    listed = await qdrant.ask(lambda client: client.list_snapshots("hybrid"))
    assert [one.name for one in listed] == [made.name]
    await qdrant.ask(lambda client: client.delete_snapshot("hybrid", made.name))
    assert await qdrant.ask(lambda client: client.list_snapshots("hybrid")) == []

"""Collections as users of Qdrant have them: named vectors, sparse ones beside, tenants, updates."""

import asyncio

import numpy as np
import pytest
from embedding_proxy.index.client import Connection
from fault_server import vector_of
from index_helpers import COLLECTION, SMALL, arrived, ask, section
from qdrant_client import models
from qdrant_server import QdrantServer

WORDS = {"indices": [3, 7], "values": [0.5, 1.25]}
OTHER_WORDS = {"indices": [9], "values": [2.0]}


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server:
        yield server


async def _client(qdrant, work):
    def do():
        client = qdrant.client()
        try:
            return work(client)
        finally:
            client.close()

    return await asyncio.to_thread(do)


def _is_of(vector, text):
    return np.allclose(vector, vector_of(SMALL, text), atol=1e-6)


async def test_one_of_several_named_vectors_is_ours(start_proxy, upstream, qdrant):
    """It is written and searched by its name; the others are left alone by updates."""
    text, image = (
        models.VectorParams(size=size, distance=models.Distance.COSINE) for size in (1536, 2)
    )
    image_of_7 = models.PointStruct(id=7, vector={"image": [0.6, 0.8]}, payload={"page": 3})

    def make(client):
        client.create_collection("docs", {"text": text, "image": image})
        client.upsert("docs", [image_of_7], wait=True)

    await _client(qdrant, make)
    index = section(qdrant, collection="docs", vector_name="text", adopt_unlabeled=True)
    proxy = await start_proxy(upstream, index=index)
    await ask(proxy, "a", "b", index={"ids": [7, 8], "update": True})
    told = await arrived(proxy)
    assert told["refused"] == []
    points = await qdrant.points("docs")
    assert all(_is_of(points[one]["vector"]["text"], text) for one, text in ((7, "a"), (8, "b")))
    assert points[7]["vector"]["image"] == pytest.approx([0.6, 0.8])
    assert (points[7]["payload"]["page"], points[7]["payload"]["text"]) == (3, "a")
    assert set(points[8]["vector"]) == {"text"}
    (hit,) = await proxy.service.query("b", SMALL, 1)
    assert (hit.id, hit.text) == (8, "b")


async def test_a_name_that_the_collection_does_not_have_is_told(start_proxy, upstream, qdrant):
    """Which key names it stands in the reason."""
    params = models.VectorParams(size=1536, distance=models.Distance.COSINE)
    await _client(qdrant, lambda client: client.create_collection("docs", {"text": params}))
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", index={"collection": "docs"})
    (refused,) = (await arrived(proxy))["refused"]
    assert "name it in index.qdrant.vector_name" in refused["reason"]


async def test_collections_are_made_as_the_configuration_says(start_proxy, upstream, qdrant):
    """Shards, replicas, graph, optimizers, sparse vectors, and the index of the tenants."""
    index = section(
        qdrant,
        vector_name="text",
        sparse_vectors={"bm25": "idf", "plain": "none"},
        shard_number=2,
        replication_factor=1,
        hnsw_config={"m": 0, "payload_m": 16},
        optimizers_config={"indexing_threshold": 50_000},
        payload_indexes={"group_id": "tenant", "year": "integer"},
    )
    proxy = await start_proxy(upstream, index=index)
    await ask(proxy, "a", index={"group_id": "acme"})
    assert (await arrived(proxy))["refused"] == []
    info = await _client(qdrant, lambda client: client.get_collection(COLLECTION))
    params, config = info.config.params, info.config
    assert (params.shard_number, params.replication_factor) == (2, 1)
    assert params.vectors["text"].size == 1536
    assert {name: one.modifier for name, one in params.sparse_vectors.items()} == {
        "bm25": models.Modifier.IDF,
        "plain": models.Modifier.NONE,
    }
    assert (config.hnsw_config.m, config.hnsw_config.payload_m) == (0, 16)
    assert config.optimizer_config.indexing_threshold == 50_000
    assert info.payload_schema["group_id"].params.is_tenant
    assert info.payload_schema["year"].data_type == "integer"


async def test_sparse_vectors_come_with_the_request(start_proxy, upstream, qdrant):
    """Beside an unnamed dense vector; an input without one has none."""
    proxy = await start_proxy(upstream, index=section(qdrant, sparse_vectors=["bm25"]))
    await ask(proxy, "a", "b", index={"sparse_vectors": [{"bm25": WORDS}, {}]})
    assert (await arrived(proxy))["refused"] == []
    points = {
        one["payload"]["text"]: one["vector"] for one in (await qdrant.points(COLLECTION)).values()
    }
    assert _is_of(points["a"][""], "a")
    assert points["a"]["bm25"] == WORDS
    dense = points["b"][""] if isinstance(points["b"], dict) else points["b"]
    assert _is_of(dense, "b")
    assert all("sparse_vectors" not in call.payload for call in upstream.calls)


@pytest.mark.parametrize("is_update", [True, False])
async def test_a_hybrid_point_keeps_its_other_vectors_where_the_request_says_so(
    is_update, start_proxy, upstream, qdrant
):
    """An update changes what it names; anything else replaces the point."""
    proxy = await start_proxy(upstream, index=section(qdrant, sparse_vectors=["bm25", "title"]))
    sparse = {"bm25": WORDS, "title": WORDS}
    await ask(
        proxy, "a", index={"ids": [1], "sparse_vectors": [sparse], "payload": [{"lang": "en"}]}
    )
    await arrived(proxy)
    change = {"ids": [1], "update": is_update, "sparse_vectors": [{"title": OTHER_WORDS}]}
    await ask(proxy, "b", index=change)
    assert (await arrived(proxy))["refused"] == []
    (point,) = (await qdrant.points(COLLECTION)).values()
    assert _is_of(point["vector"][""], "b")
    assert point["vector"]["title"] == OTHER_WORDS
    assert point["vector"].get("bm25") == (WORDS if is_update else None)
    assert point["payload"].get("lang") == ("en" if is_update else None)
    assert point["payload"]["text"] == "b"


async def test_a_folder_has_named_and_sparse_vectors_too(start_proxy, upstream, tmp_path):
    """And updates keep what they do not name."""
    folder = tmp_path / "qdrant"
    index = {"qdrant": {"path": str(folder), "vector_name": "text", "sparse_vectors": ["bm25"]}}
    proxy = await start_proxy(upstream, index=index)
    await ask(proxy, "a", index={"ids": [1], "sparse_vectors": [{"bm25": WORDS}]})
    await arrived(proxy)
    await ask(proxy, "b", index={"ids": [1], "update": True})
    assert (await arrived(proxy))["refused"] == []
    await start_proxy.stop()
    async with Connection(path=folder) as connection:
        (point,) = await connection.ask(
            lambda client: client.retrieve(COLLECTION, [1], with_vectors=True)
        )
    assert _is_of(point.vector["text"], "b")
    assert point.vector["bm25"] == models.SparseVector(**WORDS)
    assert point.payload["text"] == "b"


async def test_an_update_of_what_is_deleted_meanwhile_is_written_whole(
    start_proxy, upstream, qdrant
):
    """It is looked up before each write."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    for text in ("a", "b"):
        await ask(proxy, text, index={"ids": [1], "update": True})
        await arrived(proxy)
        (point,) = (await qdrant.points(COLLECTION)).values()
        assert point["payload"]["text"] == text
        await _client(qdrant, lambda client: client.delete(COLLECTION, [1], wait=True))


async def test_tenants_have_points_of_their_own(start_proxy, upstream, qdrant):
    """The same text of two groups is two points, bought once; a group may be a number."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    for group in ("acme", "other", 7, "acme"):
        assert (await ask(proxy, "a", index={"group_id": group})).status == 200
    assert (await arrived(proxy))["refused"] == []
    points = (await qdrant.points(COLLECTION)).values()
    assert sorted(str(one["payload"]["group_id"]) for one in points) == ["7", "acme", "other"]
    assert upstream.inputs == ["a"]


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ({"sparse_vectors": [{"bm25": [1]}]}, "$.index.sparse_vectors[0].bm25"),
        ({"sparse_vectors": [{"bm25": {"indices": [1, 1], "values": [1, 2]}}]}, "distinct"),
        ({"sparse_vectors": [{"bm25": {"indices": [1], "values": [1, 2]}}]}, "as many values"),
        ({"sparse_vectors": [{"bm25": {"indices": [1 << 32], "values": [1]}}]}, "32 bits"),
        ({"sparse_vectors": [{"bm25": {"indices": [1], "values": ["x"]}}]}, "as many values"),
        ({"sparse_vectors": [{}, {}]}, "one item for each input"),
        ({"sparse_vectors": [3]}, "an object with sparse vectors"),
        ({"group_id": ""}, "$.index.group_id"),
        ({"group_id": True}, "$.index.group_id"),
        ({"update": "yes"}, "$.index.update"),
    ],
)
async def test_a_malformed_wish_is_refused(index, problem, start_proxy, upstream, qdrant):
    """With OpenAI's 400, before anything is bought."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    response = await ask(proxy, "a", index=index)
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "index")
    assert problem in error["message"]
    assert not upstream.calls

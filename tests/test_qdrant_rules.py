"""The rules of a Qdrant server that we rely on, asked of the fake, or of the one at QDRANT_URL."""

import uuid

import pytest
from embedding_proxy.index.client import Connection
from embedding_proxy.index.errors import Exists, LimitReached, Missing, Rejected, TooLarge
from qdrant_client import models
from qdrant_server import REAL, QdrantServer

PLAIN = models.VectorParams(size=2, distance=models.Distance.COSINE)
DOT = models.VectorParams(size=2, distance=models.Distance.DOT)


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server, Connection(url=server.url) as connection:
        await connection.ask(lambda client: client.create_collection("plain", PLAIN))
        yield connection


def _point(one=1, vector=(0.6, 0.8), **payload):
    return models.PointStruct(id=one, vector=list(vector), payload=payload)


async def _put(qdrant, *points, name="plain", **options):
    return await qdrant.ask(lambda client: client.upsert(name, list(points), wait=True, **options))


async def _all(qdrant, name="plain"):
    found, _ = await qdrant.ask(lambda client: client.scroll(name, with_vectors=True))
    return {one.id: one for one in found}


async def _alias(qdrant, *changes):
    operations = [
        models.CreateAliasOperation(
            create_alias=models.CreateAlias(collection_name=to, alias_name=alias)
        )
        for alias, to in changes
    ]
    await qdrant.ask(lambda client: client.update_collection_aliases(operations))


async def test_ids_are_unsigned_integers_or_uuids(qdrant):
    """Both kinds, up to their bounds; a UUID comes back in its usual form."""
    one = uuid.uuid4()
    await _put(qdrant, _point(0), _point((1 << 64) - 1), _point(one.hex))
    assert set(await _all(qdrant)) == {0, (1 << 64) - 1, str(one)}
    for wrong in ("name", -1, 1 << 64):
        point = models.PointStruct.model_construct(id=wrong, vector=[0.6, 0.8])
        with pytest.raises(Rejected):
            await _put(qdrant, point)


async def test_one_bad_point_refuses_the_batch_and_not_what_is_before_it(qdrant):
    """Of another width, or with a vector that the collection does not have: it is not written."""
    with pytest.raises(Rejected):
        await _put(qdrant, _point(1), _point(2, (1, 2, 3)))
    assert set(await _all(qdrant)) == {1}
    with pytest.raises(Rejected):
        await _put(qdrant, models.PointStruct(id=3, vector={"other": [0.6, 0.8]}))
    assert set(await _all(qdrant)) == {1}


async def test_the_unnamed_vector_stands_beside_sparse_ones(qdrant):
    """It is named by the empty name then, or stands alone."""
    sparse = {"bm25": models.SparseVectorParams()}
    await qdrant.ask(
        lambda client: client.create_collection("hybrid", PLAIN, sparse_vectors_config=sparse)
    )
    words = models.SparseVector(indices=[1, 5], values=[0.5, 2])
    both = models.PointStruct(id=1, vector={"": [3, 4], "bm25": words})
    await _put(qdrant, both, _point(2, (3, 4)), name="hybrid")
    found = await _all(qdrant, "hybrid")
    assert found[1].vector[""] == pytest.approx([0.6, 0.8])
    assert found[1].vector["bm25"] == words
    assert _dense(found[2].vector) == pytest.approx([0.6, 0.8])


def _dense(vector):
    return vector[""] if isinstance(vector, dict) else vector


async def test_an_update_keeps_other_vectors_and_an_upsert_does_not(qdrant):
    """Of a point that is not there an update is a 404, after the others are written."""
    await qdrant.ask(lambda client: client.create_collection("named", {"x": PLAIN, "y": PLAIN}))
    both = models.PointStruct(id=1, vector={"x": [0.6, 0.8], "y": [0.6, 0.8]})
    await _put(qdrant, both, name="named")
    change = [
        models.PointVectors(id=1, vector={"x": [1.0, 0]}),
        models.PointVectors(id=2, vector={"x": [1.0, 0]}),
    ]
    with pytest.raises(Missing):
        await qdrant.ask(lambda client: client.update_vectors("named", change, wait=True))
    found = await _all(qdrant, "named")
    assert (set(found), found[1].vector["x"]) == ({1}, pytest.approx([1, 0]))
    assert found[1].vector["y"] == pytest.approx([0.6, 0.8])
    await _put(qdrant, models.PointStruct(id=1, vector={"x": [0.6, 0.8]}), name="named")
    assert set((await _all(qdrant, "named"))[1].vector) == {"x"}


async def _limit(qdrant, **limits):
    config = models.StrictModeConfig(enabled=True, **limits)
    await qdrant.ask(lambda client: client.update_collection("plain", strict_mode_config=config))


async def test_strict_mode_refuses_large_calls(qdrant):
    """Writes and reads of more points than it allows, and what no rate will ever allow."""
    await _limit(qdrant, upsert_max_batchsize=3, max_query_limit=2)
    points = [_point(n) for n in range(1, 5)]
    with pytest.raises(TooLarge) as told:
        await _put(qdrant, *points)
    assert told.value.max_items == 3
    await _put(qdrant, *points[:3])
    with pytest.raises(TooLarge) as told:
        await qdrant.ask(lambda client: client.scroll("plain", limit=3))
    assert told.value.max_items == 2
    await _limit(qdrant, write_rate_limit=2, upsert_max_batchsize=100)
    with pytest.raises(TooLarge) as told:
        await _put(qdrant, *points[:3])
    assert told.value.max_items is None


async def test_a_collection_that_is_full_says_so(qdrant):
    """That is no matter of the point; an old one may not be written again, either."""
    await _put(qdrant, _point(1), _point(2))
    await _limit(qdrant, max_points_count=2)

    async def write_again():
        # A server counts again after some writes only.
        for _ in range(100):
            await _put(qdrant, _point(1))

    with pytest.raises(LimitReached):
        await write_again()


async def test_named_vectors_have_their_names_and_widths(qdrant):
    """Another name, another width or no name is refused, on write and in a search."""
    await qdrant.ask(lambda client: client.create_collection("named", {"x": PLAIN}))
    await _put(qdrant, models.PointStruct(id=1, vector={"x": [0.6, 0.8]}), name="named")
    for wrong in ({"x": [1.0, 2, 3]}, {"y": [0.6, 0.8]}, [0.6, 0.8]):
        with pytest.raises(Rejected):
            await _put(qdrant, models.PointStruct(id=2, vector=wrong), name="named")
    for query, using in (([1.0, 2.0, 3.0], "x"), ([0.6, 0.8], "y"), ([0.6, 0.8], None)):
        with pytest.raises(Rejected):
            await qdrant.ask(
                lambda client, query=query, using=using: client.query_points(
                    "named", query=query, using=using
                )
            )


async def test_a_search_is_of_the_collections_width(qdrant):
    """A query of another width, or with a name where there is none, is refused."""
    await _put(qdrant, _point(1), _point(2, (-0.6, 0.8)))
    found = await qdrant.ask(lambda client: client.query_points("plain", query=[0.6, 0.8]))
    assert [one.id for one in found.points] == [1, 2]
    for query, using in (([1.0, 2.0, 3.0], None), ([0.6, 0.8], "x")):
        with pytest.raises(Rejected):
            await qdrant.ask(
                lambda client, query=query, using=using: client.query_points(
                    "plain", query=query, using=using
                )
            )


async def test_vectors_of_a_cosine_collection_are_scaled(qdrant):
    """They come back with length 1; by a dot product they stay as they are."""
    await qdrant.ask(lambda client: client.create_collection("dot", DOT))
    for name, expected in (("plain", [0.6, 0.8]), ("dot", [3.0, 4.0])):
        await _put(qdrant, _point(1, (3, 4)), name=name)
        assert (await _all(qdrant, name))[1].vector == pytest.approx(expected)


async def test_a_collection_that_is_not_there(qdrant):
    """It is a 404 for all that is asked of it, but deleting it is no error."""
    for work in (
        lambda client: client.get_collection("none"),
        lambda client: client.scroll("none"),
        lambda client: client.count("none"),
        lambda client: client.upsert("none", [_point()]),
        lambda client: client.delete("none", [1]),
        lambda client: client.query_points("none", query=[0.6, 0.8]),
        lambda client: client.create_payload_index("none", "lang", "keyword"),
    ):
        with pytest.raises(Missing):
            await qdrant.ask(work)
    assert not await qdrant.ask(lambda client: client.collection_exists("none"))
    await qdrant.ask(lambda client: client.delete_collection("none"))


async def test_a_name_is_a_collections_or_an_aliass(qdrant):
    """Neither can be made where there is the other; of no alias is there an alias."""
    await _alias(qdrant, ("live", "plain"))
    for name in ("plain", "live"):
        with pytest.raises(Exists):
            await qdrant.ask(lambda client, name=name: client.create_collection(name, PLAIN))
    with pytest.raises(Exists):
        await _alias(qdrant, ("plain", "plain"))
    for to in ("none", "live"):
        with pytest.raises(Missing):
            await _alias(qdrant, ("other", to))


@pytest.mark.parametrize("name", ["a<b", "a/b", "a:b", "a*b", "x" * 256])
async def test_what_no_collection_is_called(qdrant, name):
    """Some characters, and names that are too long, are refused."""
    with pytest.raises(Rejected):
        await qdrant.ask(lambda client: client.create_collection(name, PLAIN))


async def test_aliases_change_together_and_go_with_their_collection(qdrant):
    """Whoever asks by an alias is answered by its collection; one that is there is turned."""
    await qdrant.ask(lambda client: client.create_collection("second", PLAIN))
    await _put(qdrant, _point(1), name="plain")
    await _alias(qdrant, ("live", "plain"))
    assert set(await _all(qdrant, "live")) == {1}
    await _alias(qdrant, ("live", "second"))
    assert await _all(qdrant, "live") == {}
    await qdrant.ask(lambda client: client.delete_collection("second"))
    assert (await qdrant.ask(lambda client: client.get_aliases())).aliases == []


async def test_the_metadata_of_a_collection_stays_with_it(qdrant):
    """From the call that makes it on; an update changes the keys that it names."""
    await qdrant.ask(
        lambda client: client.create_collection("told", PLAIN, metadata={"a": 1, "b": 2})
    )
    await qdrant.ask(lambda client: client.update_collection("told", metadata={"b": 3}))
    info = await qdrant.ask(lambda client: client.get_collection("told"))
    assert info.config.metadata == {"a": 1, "b": 3}


async def test_what_is_only_inserted_replaces_nothing(qdrant):
    """`insert_only` writes what is not there, and leaves alone what is."""
    await _put(qdrant, _point(1, text="first"))
    mode = models.UpdateMode.INSERT_ONLY
    await _put(qdrant, _point(1, text="second"), _point(2, text="new"), update_mode=mode)
    found = await _all(qdrant)
    assert {one: point.payload["text"] for one, point in found.items()} == {1: "first", 2: "new"}


@pytest.mark.skipif(REAL is not None, reason="it has the version that it has")
async def test_an_old_server_drops_what_it_does_not_know():
    """In silence: so the version has to be asked for."""
    async with QdrantServer(version="1.15.5") as server, Connection(url=server.url) as qdrant:
        await qdrant.ask(lambda client: client.create_collection("plain", PLAIN, metadata={"a": 1}))
        info = await qdrant.ask(lambda client: client.get_collection("plain"))
        assert not info.config.metadata
        await _put(qdrant, _point(1, text="first"))
        mode = models.UpdateMode.INSERT_ONLY
        await _put(qdrant, _point(1, text="second"), update_mode=mode)
        assert (await _all(qdrant))[1].payload["text"] == "second"


async def test_pages_come_in_the_order_of_ids(qdrant):
    """Numbers first, then UUIDs; the next page begins where it is said to."""
    others = [str(uuid.UUID(int=n)) for n in (1, 2)]
    await _put(qdrant, *(_point(one) for one in (7, others[1], 3, others[0])))
    seen, offset = [], None
    while True:
        page, offset = await qdrant.ask(
            lambda client, offset=offset: client.scroll("plain", limit=3, offset=offset)
        )
        seen += [one.id for one in page]
        if offset is None:
            break
    assert seen == [3, 7, *others]

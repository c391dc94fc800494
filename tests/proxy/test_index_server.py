"""What a real Qdrant does to indexing: others delete, limits are reached, batches are too large."""

import asyncio

import orjson
import pytest
from embedding_proxy.index import outbox as outbox_module
from embedding_proxy.index import sender
from index_helpers import COLLECTION, SMALL, arrived, ask, holds, section, until
from qdrant_client import models
from qdrant_client.http.exceptions import UnexpectedResponse
from qdrant_server import QdrantServer, answer

OVER_BUDGET = (
    "Rate limiting exceeded: Write rate limit exceeded, request larger than rate limiter capacity,"
    " please try to split your request"
)


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server:
        yield server


@pytest.fixture
def _frequent_looks(monkeypatch):
    monkeypatch.setattr(sender, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(sender, "TICK_SECONDS", 0.01)


async def _by_others(qdrant, work):
    """Let somebody else do something in Qdrant."""

    def do():
        client = qdrant.client()
        try:
            return work(client)
        finally:
            client.close()

    return await asyncio.to_thread(do)


async def _delete(qdrant, *texts):
    points = await qdrant.points(COLLECTION)
    ids = [one for one, point in points.items() if point["payload"]["text"] in texts]
    assert ids
    await _by_others(qdrant, lambda client: client.delete(COLLECTION, ids, wait=True))


async def _asked_until_there(proxy, qdrant, count, *texts):
    """Ask for texts until the collection has so many points: what is known is forgotten soon."""

    async def there():
        assert (await ask(proxy, *texts)).headers["x-cache"] == "hit"
        return len(await qdrant.points(COLLECTION)) == count

    await until(there)


# What somebody else has deleted


@pytest.mark.parametrize("restart", [False, True])
async def test_a_document_is_whole_after_its_points_were_deleted(
    restart, start_proxy, upstream, qdrant
):
    """Its chunks have ids; it is deleted as the manual says, and ingested again with a change."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "one", "two", "three", index={"ids": [1, 2, 3]})
    await arrived(proxy)
    await _by_others(qdrant, lambda client: client.delete(COLLECTION, [1, 2, 3], wait=True))
    if restart:
        await start_proxy.stop()
        proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "one", "TWO", "three", index={"ids": [1, 2, 3]})
    assert (await arrived(proxy))["refused_points"] == 0
    texts = {
        one: point["payload"]["text"] for one, point in (await qdrant.points(COLLECTION)).items()
    }
    assert texts == {1: "one", 2: "TWO", 3: "three"}


@pytest.mark.usefixtures("_frequent_looks")
@pytest.mark.parametrize("restart", [False, True])
async def test_a_point_that_is_gone_is_written_again(
    restart, start_proxy, upstream, qdrant, caplog
):
    """The count of the collection tells; what is still there is not written twice."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "b", "c")
    await arrived(proxy)
    indexer = proxy.service.indexing.indexer

    async def seen():
        return not indexer._sender._written

    await until(seen)
    if restart:
        await start_proxy.stop()
    await _delete(qdrant, "a")
    if restart:
        proxy = await start_proxy(upstream, index=section(qdrant))
    before = qdrant.upserts
    await _asked_until_there(proxy, qdrant, 3, "a", "b", "c")
    assert "1 points are no longer in" in caplog.text
    assert sum(len(body["points"]) for body in qdrant.bodies[before:]) == 1
    assert upstream.inputs == ["a", "b", "c"]


@pytest.mark.usefixtures("_frequent_looks")
@pytest.mark.parametrize("restart", [False, True])
async def test_a_collection_that_is_deleted_is_filled_by_hits_alone(
    restart, start_proxy, upstream, qdrant
):
    """It needs no new point, and no restart."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "b")
    await arrived(proxy)
    if restart:
        await start_proxy.stop()
    await _by_others(qdrant, lambda client: client.delete_collection(COLLECTION))
    if restart:
        proxy = await start_proxy(upstream, index=section(qdrant))
    await _asked_until_there(proxy, qdrant, 2, "a", "b")


async def test_a_collection_that_another_proxy_made_anew_is_noticed(
    start_proxy, upstream, qdrant, tmp_path, monkeypatch
):
    """It has as many points as before, and none of them is ours: its id in the metadata tells."""
    from conftest import StartProxy  # noqa: PLC0415

    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "b")
    await arrived(proxy)
    await start_proxy.stop()
    await _by_others(qdrant, lambda client: client.delete_collection(COLLECTION))
    other = StartProxy(tmp_path / "other", monkeypatch)
    proxy = await other(upstream, index=section(qdrant))
    await ask(proxy, "c", "d", "e")
    await arrived(proxy)
    await other.stop()
    proxy = await start_proxy(upstream, index=section(qdrant))
    await _asked_until_there(proxy, qdrant, 5, "a", "b")


async def test_an_answer_in_the_fast_path_is_none_any_more(
    start_proxy, upstream, qdrant, monkeypatch, repeated
):
    """A kept response whose point is gone is not given again without the point."""
    monkeypatch.setattr(sender, "TICK_SECONDS", 0.01)
    proxy = await start_proxy(upstream, index=section(qdrant))
    for _ in range(3):
        await ask(proxy, "a")
    await arrived(proxy)
    assert repeated
    await _by_others(qdrant, lambda client: client.delete_collection(COLLECTION))
    monkeypatch.setattr(sender, "LOOK_SECONDS", 0.0)
    proxy.service.indexing.indexer._sender._next_look = 0.0
    await _asked_until_there(proxy, qdrant, 1, "a")


# Limits of the server


async def _limit(qdrant, **limits):
    config = models.StrictModeConfig(enabled=True, **limits)
    await _by_others(
        qdrant, lambda client: client.update_collection(COLLECTION, strict_mode_config=config)
    )


async def _until_counted(qdrant):
    """Write what is there until it is refused: a server counts again after some writes only."""
    ((one, point),) = (await qdrant.points(COLLECTION)).items()
    again = models.PointStruct(id=one, vector=point["vector"], payload=point["payload"])

    def write(client):
        for _ in range(100):
            client.upsert(COLLECTION, [again], wait=True)

    with pytest.raises(UnexpectedResponse):
        await _by_others(qdrant, write)


async def _failure(proxy):
    """Wait until the status tells a failure; return the snapshot."""
    indexer = proxy.service.indexing.indexer

    async def told():
        return (await indexer.snapshot())["last_failure"]

    await until(told)
    return await indexer.snapshot()


async def _waits(proxy, count):
    """Wait until so many points wait: one that Qdrant has leaves the outbox a moment later."""
    indexer = proxy.service.indexing.indexer

    async def left():
        return (await indexer.snapshot())["backlog_points"] == count

    await until(left)


async def test_a_collection_that_is_full_is_waited_for(start_proxy, upstream, qdrant):
    """No point is put aside; they arrive when somebody has made room, without a restart."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a")
    await arrived(proxy)
    await _limit(qdrant, max_points_count=1)
    await _until_counted(qdrant)
    await ask(proxy, *"bcdef")
    told = await _failure(proxy)
    assert "limit of 1 reached" in told["last_failure"]
    assert (told["refused_points"], told["backlog_points"]) == (0, 5)
    await _limit(qdrant, max_points_count=1000)
    told = await arrived(proxy)
    assert (told["refused_points"], told["last_failure"]) == (0, None)
    assert len(await qdrant.points(COLLECTION)) == 6


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "Disk usage is at 76% of total capacity, exceeding the configured limit of 70%"),
        (403, "Forbidden: Max vector storage size limit of 0.5MB reached!"),
        (500, "Service internal error: No space left on device: WAL buffer size exceeds"),
        (507, "Insufficient storage"),
        (403, "Forbidden: the server is in read-only mode"),
    ],
)
async def test_what_is_about_the_server_puts_no_point_aside(
    status, words, start_proxy, upstream, qdrant
):
    """It holds up its collection and no other; then everything arrives by itself."""

    async def full(request):
        is_write = request.method == "PUT" and request.path == f"/collections/{COLLECTION}/points"
        return await answer(status, words)(request) if is_write else None

    qdrant.always = full
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, *"abc")
    await _failure(proxy)
    await ask(proxy, "d", index={"collection": "docs"})
    await holds(qdrant, 1, "docs")
    await _waits(proxy, 3)
    told = await _failure(proxy)
    assert words[:20] in told["last_failure"]
    assert (told["refused_points"], told["backlog_points"]) == (0, 3)
    qdrant.always = None
    assert (await arrived(proxy))["refused_points"] == 0
    assert len(await qdrant.points(COLLECTION)) == 3


@pytest.mark.usefixtures("_frequent_looks")
async def test_what_was_put_aside_is_tried_again_by_itself(
    start_proxy, upstream, qdrant, monkeypatch
):
    """After a pause, without a restart."""
    monkeypatch.setattr(outbox_module, "MIN_PAUSE_S", 0.05)

    async def poisoned(request):
        body = await request.read()
        return await answer(400, "this one not")(request) if b"poison" in body else None

    qdrant.always = poisoned
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "poison")
    await holds(qdrant, 1)

    async def refused():
        told = await proxy.service.indexing.indexer.snapshot()
        return told["since_start"]["refused"] >= 3

    await until(refused)
    qdrant.always = None
    await holds(qdrant, 2)
    assert (await arrived(proxy))["refused_points"] == 0


# Batches that are too large


def _sizes(qdrant):
    return [len(body["points"]) for body in qdrant.bodies]


async def test_a_limit_on_points_a_call_is_learned(start_proxy, upstream, qdrant):
    """All arrive, none is put aside, and the next batches are within it from the first on."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "first")
    await arrived(proxy)
    await _limit(qdrant, upsert_max_batchsize=3)
    await ask(proxy, *(f"text {n}" for n in range(10)))
    assert (await arrived(proxy))["refused_points"] == 0
    assert len(await qdrant.points(COLLECTION)) == 11
    qdrant.bodies.clear()
    await ask(proxy, *(f"further {n}" for n in range(10)))
    await arrived(proxy)
    assert max(_sizes(qdrant)) <= 3


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (429, OVER_BUDGET),
        (413, "Payload Too Large"),
        (400, "Payload error: JSON payload (36001578 bytes) is larger than allowed (limit: 335)."),
        (None, ""),
    ],
)
async def test_a_batch_that_is_too_large_is_halved(status, words, start_proxy, upstream, qdrant):
    """Whatever says so: a rate that is too low for it, a gateway, or a cut connection."""
    sizes = []

    async def small(request):
        if request.method != "PUT" or not request.path.endswith("/points"):
            return None
        sizes.append(len(orjson.loads(await request.read())["points"]))
        if sizes[-1] <= 2:
            return None
        if status is None:
            request.transport.abort()
        return await answer(status or 500, words)(request)

    qdrant.always = small
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, *(f"text {n}" for n in range(9)))
    assert (await arrived(proxy))["refused_points"] == 0
    assert len(await qdrant.points(COLLECTION)) == 9
    assert sizes[:3] == [9, 4, 2]
    if status is not None:
        assert max(sizes[2:]) <= 2


async def test_a_point_that_is_too_large_alone_is_put_aside(start_proxy, upstream, qdrant):
    """The others arrive."""

    async def small(request):
        is_write = request.method == "PUT" and request.path.endswith("/points")
        if is_write and b"huge" in await request.read():
            return await answer(413, "Payload Too Large")(request)
        return None

    qdrant.always = small
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "huge", "b", "c")
    told = await arrived(proxy)
    assert told["refused"][0]["reason"] == "HTTP 413: Payload Too Large"
    assert len(await qdrant.points(COLLECTION)) == 3


async def test_the_models_of_one_key_are_indexed_where_it_may_write(
    start_proxy, upstream, qdrant, monkeypatch
):
    """A key with rights to one collection; what is for another waits, and holds up nobody."""
    monkeypatch.setenv("MY_KEY", "k")
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a")
    await arrived(proxy)
    await start_proxy.stop()
    qdrant.rights = {COLLECTION: "rw"}
    proxy = await start_proxy(upstream, index=section(qdrant, api_key_env="MY_KEY"))
    await ask(proxy, "b", index={"collection": "docs"})
    await ask(proxy, "c")
    await holds(qdrant, 2)
    await _waits(proxy, 1)
    told = await _failure(proxy)
    assert "not accepted for reading the configuration of docs" in told["last_failure"]
    assert (told["refused_points"], told["backlog_points"]) == (0, 1)
    qdrant.rights = {"*": "rw"}
    await holds(qdrant, 1, "docs")
    assert SMALL in COLLECTION

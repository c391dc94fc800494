"""`embedding-proxy index`: status, retry and resync, beside a proxy that runs and without one."""

import asyncio
import json
import sqlite3
from contextlib import closing

import pytest
from embedding_proxy.index.outbox import FILE_NAME
from index_helpers import COLLECTION, SPACE, arrived, ask, holds, section
from qdrant_server import QdrantServer, answer


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server:
        yield server


@pytest.fixture
def index(upstream, qdrant, tmp_path, command):
    """Give a function that runs a command of the group on the proxy's configuration."""
    config = tmp_path / "config.yaml"

    async def run(*arguments, **more):
        sections = {
            "providers": {"openai": {"base_url": upstream.url}},
            "cache": {"directory": str(tmp_path / "cache")},
            "index": section(qdrant, **more),
        }
        config.write_text(json.dumps(sections))
        return await asyncio.to_thread(command, "index", *arguments, "--config", str(config))

    return run


def _poison(qdrant, words="this one not"):
    async def refuse(request):
        body = await request.read()
        return await answer(400, words)(request) if b"poison" in body else None

    qdrant.always = refuse


async def _delete(qdrant, ids, name=COLLECTION):
    def do():
        client = qdrant.client()
        client.delete(name, ids, wait=True)
        client.close()

    await asyncio.to_thread(do)


async def test_the_status_is_that_of_the_proxy(index, start_proxy, upstream, qdrant):
    """Without a proxy, beside one, and where there is nothing yet."""
    done = await index("status")
    assert (done.code, done.out) == (0, "waiting: 0 points, 0 B\nput aside: 0 points\n")
    _poison(qdrant)
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "poison", "b")
    told = await arrived(proxy)
    for is_running in (True, False):
        done = await index("status", "--json")
        assert done.code == 0
        assert {name: told[name] for name in ("backlog_points", "refused_points", "refused")} == {
            name: done.json[name] for name in ("backlog_points", "refused_points", "refused")
        }
        (one,) = done.json["collections"]
        assert one == {"collection": COLLECTION, "space": SPACE, "dimensions": 1536,
                       "waiting": 0, "refused": 1, "journaled": 3}  # fmt: skip
        if is_running:
            await start_proxy.stop()
    done = await index("status")
    assert "put aside: 1 point\n" in done.out
    assert f"  {COLLECTION}: 1 point: HTTP 400: this one not\n" in done.out


@pytest.mark.parametrize("is_running", [True, False])
async def test_what_was_put_aside_is_tried_again_at_once(
    is_running, index, start_proxy, upstream, qdrant
):
    """By the proxy if one runs, else by the command; what is refused again is exit code 1."""
    _poison(qdrant)
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "poison")
    await arrived(proxy)
    if not is_running:
        await start_proxy.stop()
        done = await index("retry")
        assert (done.code, done.out) == (1, "1 point tried again; 1 point refused again\n")
    qdrant.always = None
    done = await index("retry", "--json")
    sent_by = "the proxy" if is_running else "this command"
    assert (done.code, done.json["queued"], done.json["sent_by"]) == (0, 1, sent_by)
    await holds(qdrant, 2)
    if is_running:
        await arrived(proxy)
    done = await index("status", "--json")
    assert (done.json["backlog_points"], done.json["refused_points"]) == (0, 0)
    assert (await index("retry")).out == "0 points tried again\n"


@pytest.mark.parametrize("is_running", [True, False])
async def test_what_is_lost_is_sent_again_from_the_cache(
    is_running, index, start_proxy, upstream, qdrant
):
    """Points of all kinds are what they were, nothing is bought, and nothing else is written."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "b", "c")
    wish = {"ids": [1, 2], "payload": [{"lang": "en"}, {"lang": "de"}], "group_id": "acme"}
    await ask(proxy, "a", "d", index=wish, dimensions=256)
    await arrived(proxy)
    narrow = COLLECTION.replace("1536", "256")
    before = [await qdrant.points(name) for name in (COLLECTION, narrow)]
    if not is_running:
        await start_proxy.stop()
    await _delete(qdrant, [*before[0]][:2])
    await _delete(qdrant, [2], narrow)
    bought, upserts = len(upstream.inputs), qdrant.upserts
    done = await index("resync", "--dry-run", "--json")
    assert (done.code, qdrant.upserts) == (0, upserts)
    rows = [
        {"collection": COLLECTION, "exists": True, "missing": 2, "queued": 2, "not_cached": 0},
        {"collection": narrow, "exists": True, "missing": 1, "queued": 1, "not_cached": 0},
    ]
    assert done.json["collections"] == rows
    done = await index("resync", COLLECTION)
    assert (done.code, f"{COLLECTION}: 2 points missing, 2 sent again\n" in done.out) == (0, True)
    await holds(qdrant, 3)
    assert len(await qdrant.points(narrow)) == 1
    done = await index("resync")
    assert done.code == 0, done.err
    await holds(qdrant, 2, narrow)
    assert [await qdrant.points(name) for name in (COLLECTION, narrow)] == before
    assert sum(len(body["points"]) for body in qdrant.bodies[upserts:]) == 3
    assert len(upstream.inputs) == bought
    assert "2 points missing" not in (await index("resync")).out


async def test_a_deleted_collection_is_filled_whole(index, start_proxy, upstream, qdrant):
    """It is made anew if it is named: somebody may have meant to delete it."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "b", "c")
    await arrived(proxy)
    await start_proxy.stop()

    def drop():
        client = qdrant.client()
        client.delete_collection(COLLECTION)
        client.close()

    await asyncio.to_thread(drop)
    done = await index("resync")
    assert (done.code, f"{COLLECTION}: is not there; name it" in done.out) == (0, True)
    assert await qdrant.points(COLLECTION) == {}
    done = await index("resync", COLLECTION, "--json")
    assert (done.code, done.json["collections"][0]["queued"]) == (0, 3)
    assert len(await qdrant.points(COLLECTION)) == 3


async def test_what_the_cache_does_not_have_is_told(  # noqa: PLR0917 - fixtures
    index, start_proxy, upstream, qdrant, tmp_path, command
):
    """Its next answer writes it; and of what is purged nothing is known."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "b", "c")
    await arrived(proxy)
    await start_proxy.stop()
    found = await qdrant.points(COLLECTION)
    texts = {point["payload"]["text"]: one for one, point in found.items()}
    await _delete(qdrant, [texts["a"], texts["b"]])
    config = str(tmp_path / "config.yaml")
    await index("status")
    purge = ("cache", "purge", "--input", "a", "--model", "text-embedding-3-small", "--yes")
    assert (await asyncio.to_thread(command, *purge, "--config", config)).code == 0
    assert b'"a"' not in (tmp_path / "cache" / FILE_NAME).read_bytes()
    (store,) = tmp_path.glob("cache/v*/cache.db")
    with closing(sqlite3.connect(store)) as sql, sql:
        sql.execute("DELETE FROM Cache")
    done = await index("resync", "--json")
    row = {"collection": COLLECTION, "exists": True, "missing": 1, "queued": 0, "not_cached": 1}
    assert (done.code, done.json["collections"]) == (0, [row])
    assert len(await qdrant.points(COLLECTION)) == 1
    await arrived(await start_proxy(upstream, index=section(qdrant)))
    await ask(await start_proxy(upstream, index=section(qdrant)), "b")
    await holds(qdrant, 2)


async def test_a_qdrant_that_is_away_is_one_line(index, start_proxy, upstream, qdrant, monkeypatch):
    """It says where, what was being done, and what becomes of it."""
    monkeypatch.setattr("embedding_proxy.index.collection_reader.MAX_TRIES", 1)
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a")
    await arrived(proxy)
    await start_proxy.stop()
    await qdrant.stop()
    done = await index("resync")
    place = qdrant.url.removeprefix("http://")
    assert (done.code, f"connection refused by {place} while " in done.err) == (1, True)
    assert "do it again for the rest" in done.err
    done = await index("resync", "nothing")
    assert done.code == 1

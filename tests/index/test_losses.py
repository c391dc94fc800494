"""Whatever others delete, and whenever the proxy starts anew: what is asked for again is there."""

import asyncio
import random

import pytest
from clock import until
from embedding_proxy.index import sender
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import CollectionOptions
from embedding_proxy.index.indexer import Indexer
from embedding_proxy.index.outbox import Outbox
from embedding_proxy.index.point import Point, Target, id_bytes
from qdrant_server import QdrantServer

TARGET = Target("docs", "m", 2)
VECTOR = bytes.fromhex("0000803f00000000")
IDS = range(12)


def _indexer(folder, url):
    async def nothing(_):
        pass

    return Indexer(
        folder,
        lambda: Connection(url=url),
        CollectionOptions(),
        on_open=nothing,
        size_limit=1 << 30,
        max_bytes=1 << 20,
    )


def _points(numbers, *, plain=True):
    return [
        Point(id_bytes(n), VECTOR, b"{}" if plain else b'{"k": 1}', plain=plain, new=not plain)
        for n in numbers
    ]


async def _settled(indexer, looks):
    """Wait until nothing is pending, and the collection has been looked at since."""
    async with asyncio.timeout(60):
        while (await indexer.snapshot())["backlog_points"]:  # noqa: ASYNC110 - it is on disk
            await asyncio.sleep(0.005)
        before = len(looks)
        await until(lambda: len(looks) >= before + 2)


@pytest.mark.parametrize("seed", range(8))
async def test_what_is_asked_for_again_is_there(seed, tmp_path, monkeypatch):
    """Points are added, deleted by others one by one or with their collection, in any order."""
    draw, looks, tidy = random.Random(seed), [], Outbox.tidy

    def noted(self):
        looks.append(1)
        tidy(self)

    monkeypatch.setattr(sender, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(sender, "TICK_SECONDS", 0.005)
    # It comes behind each look of an idle sender.
    monkeypatch.setattr(Outbox, "tidy", noted)
    async with QdrantServer() as server, Connection(url=server.url) as others:
        indexer = _indexer(tmp_path, server.url)
        await indexer.__aenter__()
        for _ in range(10):
            some = draw.sample(IDS, draw.randint(1, 6))
            match draw.choice(["hits", "hits", "payload", "delete", "drop", "restart"]):
                case "hits":
                    await indexer.add(TARGET, _points(some))
                case "payload":
                    await indexer.add(TARGET, _points(some, plain=False))
                case "delete" if await server.points("docs"):
                    await others.ask(lambda client, ids=some: client.delete("docs", ids, wait=True))
                case "drop":
                    await others.ask(lambda client: client.delete_collection("docs"))
                case "restart":
                    await indexer.__aexit__(None, None, None)
                    indexer = _indexer(tmp_path, server.url)
                    await indexer.__aenter__()
            await _settled(indexer, looks)
        # What the process remembers is forgotten within a second.
        indexer._forget()
        await indexer.add(TARGET, _points(IDS))
        await _settled(indexer, looks)
        assert set(await server.points("docs")) == set(IDS)
        before = server.upserts
        indexer._forget()
        await indexer.add(TARGET, _points(IDS))
        await _settled(indexer, looks)
        assert server.upserts == before
        await indexer.__aexit__(None, None, None)

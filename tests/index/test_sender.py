"""How long the sender waits, and what it does not wait for."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from qdrant_server import QdrantServer, answer, overloaded

from index import sender
from index.collection import Making
from index.connection import Connection
from index.indexer import Indexer
from index.point import Point, Target, id_bytes

TARGET = Target("docs", "m", 2)
VECTOR = bytes.fromhex("0000803f00000000")


@asynccontextmanager
async def sending(folder, url):
    """Give an indexer, and the seconds that it has waited after failures."""
    waits = []

    async def wait(seconds):
        waits.append(seconds)

    async def nothing(_):
        pass

    indexer = Indexer(
        folder,
        lambda: Connection(url=url),
        Making(),
        on_open=nothing,
        size_limit=1 << 30,
        most_bytes=1 << 20,
        sleep=wait,
    )
    async with indexer:
        yield indexer, waits


async def drained(indexer):
    async with asyncio.timeout(20):
        while (await indexer.snapshot())["backlog_points"]:  # noqa: ASYNC110 - it is on disk
            await asyncio.sleep(0.005)


def points(count):
    return [Point(id_bytes(n), VECTOR, b"{}", 0, new=False) for n in range(count)]


@pytest.mark.parametrize(
    ("act", "least", "most"),
    [
        (overloaded(7), 7, 7),
        (overloaded(86_400), sender.LONGEST_WAIT, sender.LONGEST_WAIT),
        (answer(503, "busy", **{"Retry-After": "2.5"}), 2.5, 2.5),
        (answer(503, "busy"), 0.25, 1),
        (answer(403, "forbidden"), sender.LONGEST_PAUSE, sender.LONGEST_PAUSE),
    ],
)
async def test_the_wait_is_what_qdrant_asks_for_or_short(act, least, most, tmp_path):
    """A wait that was asked for is kept, within bounds; without one the first is short."""
    async with QdrantServer() as server, sending(tmp_path, server.url) as (indexer, waits):
        server.script.append(act)
        await indexer.add(TARGET, points(1))
        await drained(indexer)
        assert len(waits) == 1
        assert least <= waits[0] <= most


async def test_the_waits_grow_and_shrink_again(tmp_path):
    """Each failure in a row doubles the wait, up to a bound; a success ends the row."""
    async with QdrantServer() as server, sending(tmp_path, server.url) as (indexer, waits):
        server.script += [answer(503, "busy")] * 12
        await indexer.add(TARGET, points(1))
        await drained(indexer)
        assert len(waits) == 12
        assert sender.LONGEST_PAUSE / 2 <= waits[-1] <= sender.LONGEST_PAUSE
        assert waits[0] < waits[4] < waits[8]
        server.script.append(answer(503, "busy"))
        await indexer.add(TARGET, points(3))
        await drained(indexer)
        assert waits[-1] <= 1


async def test_a_fault_of_the_sender_itself_ends_nothing(tmp_path, monkeypatch, caplog):
    """A mistake in our own code is logged, and the next try may succeed."""
    right, calls = sender.upsert, []

    async def wrong_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise ArithmeticError
        await right(*arguments)

    monkeypatch.setattr(sender, "upsert", wrong_once)
    async with QdrantServer() as server, sending(tmp_path, server.url) as (indexer, _):
        await indexer.add(TARGET, points(5))
        await drained(indexer)
        assert len(await server.points("docs")) == 5
    assert "sending to Qdrant failed" in caplog.text


async def test_a_memory_that_is_bounded_begins_anew(tmp_path, monkeypatch):
    """Beyond its bound ids are looked up on disk again, and nothing is added twice."""
    monkeypatch.setattr("index.indexer.MOST_REMEMBERED", 3)
    async with QdrantServer() as server, sending(tmp_path, server.url) as (indexer, _):
        await indexer.add(TARGET, points(5))
        assert all(indexer.knows(TARGET, id_bytes(n)) for n in range(5))
        await indexer.add(TARGET, points(1))
        assert [indexer.knows(TARGET, id_bytes(n)) for n in range(2)] == [True, False]
        await indexer.add(TARGET, points(5))
        assert indexer.added == 5

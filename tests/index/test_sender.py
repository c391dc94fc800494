"""How long the sender waits, and what it does not wait for."""

import asyncio
import re
import sqlite3
from contextlib import asynccontextmanager
from dataclasses import replace

import orjson
import pytest
from clock import Clock
from embedding_proxy.index import indexer as indexer_module
from embedding_proxy.index import sender
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import CollectionOptions
from embedding_proxy.index.indexer import Indexer
from embedding_proxy.index.outbox import Outbox, OutboxFull
from embedding_proxy.index.point import Point, Target, id_bytes
from embedding_proxy.providers.failure_backoff import MIN_SECONDS, THRESHOLD, Backoff
from qdrant_server import QdrantServer, answer, overloaded

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
        CollectionOptions(),
        on_open=nothing,
        size_limit=1 << 30,
        max_bytes=1 << 20,
        sleep=wait,
    )
    async with indexer:
        yield indexer, waits


async def drained(indexer):
    async with asyncio.timeout(60):
        while (await indexer.snapshot())["backlog_points"]:  # noqa: ASYNC110 - it is on disk
            await asyncio.sleep(0.005)


def points(count):
    return [Point(id_bytes(n), VECTOR, b"{}", plain=True, new=False) for n in range(count)]


@pytest.mark.parametrize(
    ("act", "least", "most"),
    [
        (overloaded(7), 7, 7),
        (overloaded(86_400), sender.MAX_WAIT_S, sender.MAX_WAIT_S),
        (answer(503, "busy", **{"Retry-After": "2.5"}), 2.5, 2.5),
        (answer(503, "busy"), 0.25, 1),
        (answer(403, "forbidden"), sender.MAX_PAUSE_S, sender.MAX_PAUSE_S),
    ],
)
async def test_the_wait_is_what_qdrant_asks_for_or_short(act, least, most, tmp_path, caplog):
    """A wait that was asked for is kept, within bounds; without one the first is short."""
    async with QdrantServer() as server, sending(tmp_path, server.url) as (indexer, waits):
        server.script.append(act)
        await indexer.add(TARGET, points(1))
        await drained(indexer)
        assert len(waits) == 1
        (told,) = re.findall("tried again in ([0-9.]+) s", caplog.text)
        assert least <= float(told) <= most
        assert waits[0] <= most


async def test_the_waits_grow_and_shrink_again(tmp_path):
    """Each failure in a row doubles the wait, up to a bound; a success ends the row."""
    async with QdrantServer() as server, sending(tmp_path, server.url) as (indexer, waits):
        server.script += [answer(503, "busy")] * 12
        await indexer.add(TARGET, points(1))
        await drained(indexer)
        assert len(waits) == 12
        assert sender.MAX_PAUSE_S / 2 <= waits[-1] <= sender.MAX_PAUSE_S
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
    monkeypatch.setattr("embedding_proxy.index.indexer.MAX_REMEMBERED", 3)
    async with QdrantServer() as server, sending(tmp_path, server.url) as (indexer, _):
        await indexer.add(TARGET, points(5))
        assert all(indexer.knows(TARGET, id_bytes(n)) for n in range(5))
        await indexer.add(TARGET, points(1))
        assert [indexer.knows(TARGET, id_bytes(n)) for n in range(2)] == [True, False]
        await indexer.add(TARGET, points(5))
        assert indexer.added == 5


@pytest.mark.parametrize(
    ("poison", "sizes"),
    [
        ({0}, [5, 2, 1, 1, 3]),
        ({4}, [5, 2, 3, 1, 2, 1, 1]),
        ({1, 3}, [5, 2, 1, 1, 3, 1, 2, 1, 1]),
        ({0, 1, 2, 3, 4}, [5, 2, 1, 1, 3, 1, 2, 1, 1]),
    ],
)
async def test_a_refused_batch_is_halved_and_both_halves_are_written(
    poison, sizes, tmp_path, monkeypatch
):
    """Until what is wrong is alone, and with one look at the collection."""
    looks, right, seen = [], sender.ensure, []

    async def look(*arguments):
        looks.append(arguments)
        return await right(*arguments)

    monkeypatch.setattr(sender, "ensure", look)
    async with QdrantServer() as server:

        async def refuse(request):
            if request.method != "PUT" or not request.path.endswith("/points"):
                return None
            numbers = {one["id"] for one in orjson.loads(await request.read())["points"]}
            seen.append(len(numbers))
            return await answer(400, "not this one")(request) if numbers & poison else None

        server.always = refuse
        async with sending(tmp_path, server.url) as (indexer, waits):
            await indexer.add(TARGET, points(5))
            await drained(indexer)
            told = await indexer.snapshot()
        assert seen == sizes
        assert (len(looks), waits) == (1, [])
        assert set(await server.points("docs")) == {0, 1, 2, 3, 4} - poison
        assert (told["refused_points"], told["since_start"]["sent"]) == (
            len(poison),
            5 - len(poison),
        )


@pytest.mark.parametrize(
    "failure",
    [OSError("no space left"), sqlite3.OperationalError("disk I/O error"), OutboxFull("1 MB")],
)
async def test_an_outbox_that_keeps_failing_is_left_alone_for_a_while(
    failure, tmp_path, monkeypatch
):
    """After some failures in a row nothing touches the disk for a second; then all is as before."""
    tries, right, clock = [], Outbox.add, Clock()

    def fails(self, target, some):
        tries.append(len(some))
        if failing:
            raise failure
        return right(self, target, some)

    monkeypatch.setattr(Outbox, "add", fails)
    failing = True
    async with QdrantServer() as server, sending(tmp_path, server.url) as (indexer, _):
        indexer._backoff = Backoff(threshold=THRESHOLD, clock=clock)
        for _ in range(THRESHOLD + 2):
            await indexer.add(TARGET, points(2))
        assert (len(tries), indexer.dropped) == (THRESHOLD, 2 * THRESHOLD + 4)
        clock.now += MIN_SECONDS
        failing = False
        for number in range(1, THRESHOLD):
            await indexer.add(TARGET, points(2 + number))
        # It succeeded in between, so these failures are the first of another row.
        failing = True
        for _ in range(THRESHOLD - 1):
            await indexer.add(TARGET, points(9))
        failing = False
        await indexer.add(TARGET, points(9))
        await drained(indexer)
        assert len(await server.points("docs")) == 9


async def test_what_is_remembered_of_collections_is_bounded(tmp_path, monkeypatch):
    """Requests name collections: those without a point to remember, or with few, fill no memory."""
    monkeypatch.setattr(indexer_module, "MAX_REMEMBERED", 100)
    async with QdrantServer() as server, sending(tmp_path, server.url) as (indexer, _):
        for number in range(20):
            target = TARGET._replace(collection=f"docs-{number}")
            await indexer.add(target, points(1))
            assert indexer.knows(target, points(1)[0].id)
            marked = TARGET._replace(collection=f"marked-{number}")
            await indexer.add(marked, [replace(points(1)[0], plain=False)])
            assert len(indexer._remembered) <= 7

"""Indexing from a client's side: what is answered arrives in Qdrant, whatever Qdrant does."""

import asyncio
import re
import sqlite3
import sys
import uuid
from unittest.mock import Mock

import numpy as np
import pytest
from embedding_proxy.cache.key import keyring
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import Provenance, ensure, name_of
from embedding_proxy.index.outbox import Outbox
from embedding_proxy.index.point import Target
from embedding_proxy.providers.base import Space
from embedding_proxy.proxy.config.index import Qdrant
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.service.index_writes import collection_of
from fault_server import vector_of
from index_helpers import COLLECTION, SMALL, SPACE, arrived, ask, holds, section, until
from qdrant_server import QdrantServer, answer, overloaded


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server:
        yield server


async def test_what_is_answered_is_indexed_under_ids_that_follow_from_it(
    start_proxy, upstream, qdrant
):
    """Each input becomes one point, with its vector and its payload; asked again, it stays one."""
    proxy = await start_proxy(upstream, index=section(qdrant, payload_indexes=["model"]))
    for _ in range(2):
        assert (await ask(proxy, "a", "b", "a")).status == 200
    told = await arrived(proxy)
    points = await qdrant.points(COLLECTION)
    space = proxy.service.models[SMALL].space
    expected = {str(uuid.UUID(bytes=keyring(space).key(text).address)): text for text in "ab"}
    assert {one: point["payload"]["text"] for one, point in points.items()} == expected
    for point in points.values():
        payload = point["payload"]
        assert np.allclose(point["vector"], vector_of(SMALL, payload["text"]), atol=1e-7)
        assert payload["created_at"].endswith("Z")
        assert (payload["model"], payload["space"]) == (SMALL, SPACE)
        assert (payload["dimensions"], payload["tokens"]) == (1536, 1)
    assert told["since_start"] == {
        "added": 2, "sent": 2, "refused": 0, "dropped": 0, "failures": 0,
        "damaged": 0,
    }  # fmt: skip
    assert all("index" not in call.payload for call in upstream.calls)


async def test_a_full_hit_of_known_points_writes_nothing_at_all(start_proxy, upstream, qdrant):
    """Neither the outbox nor Qdrant is touched by what is indexed, also after a restart."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "b")
    await arrived(proxy)
    await start_proxy.stop()
    proxy = await start_proxy(upstream, index=section(qdrant))
    requests = qdrant.upserts
    for _ in range(2):
        assert (await ask(proxy, "b", "a")).headers["x-cache"] == "hit"
    assert (await arrived(proxy))["since_start"]["added"] == 0
    assert qdrant.upserts == requests


async def test_what_was_cached_before_is_indexed_by_its_next_hit(start_proxy, upstream, qdrant):
    """Indexing that is switched on later takes in what is asked for from then on, unpaid."""
    await ask(await start_proxy(upstream), "a")
    await start_proxy.stop()
    proxy = await start_proxy(upstream, index=section(qdrant))
    assert (await ask(proxy, "a")).headers["x-cache"] == "hit"
    await arrived(proxy)
    assert len(await qdrant.points(COLLECTION)) == 1
    assert upstream.inputs == ["a"]


async def test_a_request_says_where_under_which_ids_and_with_what(start_proxy, upstream, qdrant):
    """Collection, ids of both kinds and payloads are the request's; nobody upstream sees them."""
    proxy = await start_proxy(upstream, index=section(qdrant, store_text=False))
    identity = str(uuid.uuid4())
    for lang in ("en", "de", "de"):
        wish = {
            "collection": "docs",
            "ids": [7, identity],
            "payload": [{"lang": lang, "model": "mine"}, {}],
        }
        assert (await ask(proxy, "a", "b", index=wish, dimensions=256)).status == 200
    told = await arrived(proxy)
    points = await qdrant.points("docs")
    assert set(points) == {7, identity}
    assert points[7]["payload"]["lang"] == "de"
    assert points[7]["payload"]["model"] == SMALL
    assert "text" not in points[7]["payload"]
    cut = vector_of(SMALL, "a")[:256]
    assert np.allclose(points[7]["vector"], cut / np.linalg.norm(cut), atol=1e-6)
    assert told["since_start"]["added"] == 6
    assert all(
        set(call.payload) <= {"model", "input", "encoding_format"} for call in upstream.calls
    )


@pytest.mark.parametrize(
    ("fields", "headers"), [({"index": False}, {}), ({}, {"Cache-Control": "no-store"})]
)
async def test_nothing_is_indexed_of_a_request_that_wants_no_trace(
    fields, headers, start_proxy, upstream, qdrant
):
    """`index: false` and `no-store` leave nothing in Qdrant or on the way there."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    body = {"model": SMALL, "input": "a", **fields}
    assert (await proxy.post(body, **headers)).status == 200
    assert (await arrived(proxy))["since_start"]["added"] == 0


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (3, "an object"),
        ({"id": [1]}, "unknown key"),
        ({"ids": [1]}, "one item for each input: 2, and not 1"),
        ({"ids": [1, -1]}, "$.index.ids[1]"),
        ({"ids": [True, 1]}, "$.index.ids[0]"),
        ({"ids": ["x", 1]}, "a UUID"),
        ({"ids": "ab"}, "must be an array"),
        ({"payload": [{}, 1]}, "$.index.payload[1]"),
        ({"collection": ""}, "non-empty"),
        ({"collection": "a/b"}, "no name"),
        ({"collection": "c" * 300}, "200 characters"),
    ],
)
async def test_a_malformed_wish_is_refused_before_anything_is_bought(
    index, problem, start_proxy, upstream, qdrant
):
    """What Qdrant would refuse later gets OpenAI's 400 at once."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    response = await ask(proxy, "a", "b", index=index)
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "index")
    assert problem in error["message"]
    assert not upstream.calls


async def test_a_wish_without_a_qdrant_is_told_what_to_configure(start_proxy, upstream):
    """Without index.qdrant the field is a 400, but for `false`, which asks for what is the case."""
    proxy = await start_proxy(upstream)
    response = await ask(proxy, "a", index={"ids": [1]})
    assert response.status == 400
    assert "index.qdrant.url" in (await response.json())["error"]["message"]
    assert (await ask(proxy, "a", index=False)).status == 200


async def test_an_outage_delays_points_and_nothing_else(start_proxy, upstream, qdrant):
    """Requests go on while Qdrant is away, the backlog is told, and all arrives when it is back."""
    await qdrant.stop()
    proxy = await start_proxy(upstream, index=section(qdrant))
    for n in range(5):
        assert (await ask(proxy, f"text {n}")).status == 200
    status = await (await proxy.http.get(proxy.url.replace("/v1", "/status"))).json()
    assert status["index"]["backlog_points"] == 5
    assert status["index"]["backlog_bytes"] > 5 * 1536 * 4
    metrics = await (await proxy.http.get(proxy.url.replace("/v1", "/metrics"))).text()
    assert "embedding_proxy_index_backlog_points 5.0" in metrics
    assert "embedding_proxy_index_backlog_age_seconds " in metrics
    await qdrant.start()
    told = await arrived(proxy)
    assert told["since_start"]["failures"] > 0
    assert told["last_failure"] is None
    assert len(await qdrant.points(COLLECTION)) == 5


async def test_a_restart_sends_what_waited(start_proxy, upstream, qdrant):
    """What was acknowledged while Qdrant was away is sent by the next proxy."""
    await qdrant.stop()
    await ask(await start_proxy(upstream, index=section(qdrant)), "a", "b")
    await start_proxy.stop()
    await qdrant.start()
    await arrived(await start_proxy(upstream, index=section(qdrant)))
    assert len(await qdrant.points(COLLECTION)) == 2


async def test_passing_faults_of_qdrant_cost_a_repetition(start_proxy, upstream, qdrant):
    """429, 503 and 500 are waited out."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    qdrant.script += [overloaded(1), answer(503, "busy"), answer(500, "x"), overloaded(None)]
    await ask(proxy, *"abcde")
    told = await arrived(proxy)
    assert told["since_start"]["failures"] == 4
    assert len(await qdrant.points(COLLECTION)) == 5


async def test_poison_is_put_aside_and_blocks_nobody(start_proxy, upstream, qdrant):
    """A point that Qdrant refuses ends among the refused, with the reason; the rest arrives."""

    async def poisoned(request):
        body = await request.read()
        return await answer(400, "this one not")(request) if b"poison" in body else None

    qdrant.always = poisoned
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "b", "poison", "c", "d")
    told = await arrived(proxy)
    assert {p["payload"]["text"] for p in (await qdrant.points(COLLECTION)).values()} == set("abcd")
    assert told["refused_points"] == 1
    assert told["refused"][0]["collection"] == COLLECTION
    assert "this one not" in told["refused"][0]["reason"]


async def test_what_makes_the_server_fail_steps_back_and_is_not_lost(start_proxy, upstream, qdrant):
    """A point on which Qdrant fails with 500 does not hold up others, and waits for better days."""

    async def poisoned(request):
        body = await request.read()
        return await answer(500, "panicked")(request) if b"poison" in body else None

    qdrant.always = poisoned
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", "b", "poison", "c", "d")
    await holds(qdrant, 4)
    qdrant.always = None
    await arrived(proxy)
    assert len(await qdrant.points(COLLECTION)) == 5


async def test_the_newest_of_an_id_arrives_last(start_proxy, upstream, qdrant):
    """Writes to one id arrive in the order of their requests, though they meet an outage."""
    await qdrant.stop()
    proxy = await start_proxy(upstream, index=section(qdrant))
    for text in ("first", "second", "third", "first"):
        await ask(proxy, text, index={"ids": [1]})
    await qdrant.start()
    await arrived(proxy)
    assert (await qdrant.points(COLLECTION))[1]["payload"]["text"] == "first"


async def _foreign(qdrant, name):
    async with Connection(url=qdrant.url) as connection:
        await ensure(connection, name, Provenance("openai/text-embedding-ada-002", 1536))


@pytest.mark.parametrize("named", [None, "docs"])
async def test_a_start_is_refused_where_a_collection_is_another_spaces(
    named, start_proxy, upstream, qdrant
):
    """Vectors of equal width do not compare: the start names the collection and both spaces."""
    async with Connection(url=qdrant.url) as connection:
        wanted = Provenance("somebody/elses", 1536)
        await ensure(connection, named or COLLECTION, wanted)
    with pytest.raises(ConfigError, match=f"index.qdrant: .*{named or COLLECTION}.*somebody/elses"):
        await start_proxy(upstream, index=section(qdrant, collection=named))


async def test_a_write_to_another_spaces_collection_is_refused(start_proxy, upstream, qdrant):
    """The request is answered, the point is put aside with the reason, the collection as it was."""
    await _foreign(qdrant, "docs")
    proxy = await start_proxy(upstream, index=section(qdrant))
    assert (await ask(proxy, "a", index={"collection": "docs"})).status == 200
    told = await arrived(proxy)
    assert "do not compare" in told["refused"][0]["reason"]
    assert not await qdrant.points("docs")


async def test_an_alias_that_turns_to_another_space_is_noticed(start_proxy, upstream, qdrant):
    """Before each write the collection is looked at, also when it was right a moment ago."""
    from qdrant_client import models  # noqa: PLC0415

    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", index={"collection": "own"})
    await arrived(proxy)
    await _foreign(qdrant, "foreign")

    async def turn(name):
        made = models.CreateAlias(collection_name=name, alias_name="docs")
        action = models.CreateAliasOperation(create_alias=made)
        async with Connection(url=qdrant.url) as connection:
            await connection.ask(lambda client: client.update_collection_aliases([action]))

    await turn("own")
    await ask(proxy, "b", index={"collection": "docs"})
    assert not (await arrived(proxy))["refused_points"]
    await turn("foreign")
    await ask(proxy, "c", index={"collection": "docs"})
    assert (await arrived(proxy))["refused_points"] == 1
    assert len(await qdrant.points("own")) == 2


async def test_a_stand_ins_vectors_go_to_their_own_spaces_collection(
    start_proxy, upstream, second, qdrant
):
    """What answers in another model's place is indexed as what it is, or not at all."""
    await upstream.stop()
    models = {
        SMALL: {
            "routes": [{"provider": "openai", "model": SMALL}],
            "fallback": [{"model": "stand-in", "dimension_policy": "truncate"}],
        },
        "stand-in": {
            "space": "other/model",
            "dimensions": 1536,
            "routes": [{"provider": "openrouter", "model": "other/model"}],
        },
    }
    proxy = await start_proxy(upstream, second, models=models, index=section(qdrant))
    response = await ask(proxy, "a")
    assert response.headers["x-embedding-fallback"] == "true"
    await ask(proxy, "b", index={"collection": "docs"})
    await arrived(proxy)
    (found,) = (await qdrant.points("stand-in-1536")).values()
    assert found["payload"]["space"] == "other/model"
    async with Connection(url=qdrant.url) as connection:
        names = await connection.ask(lambda client: client.get_collections())
    assert {COLLECTION, "docs"}.isdisjoint(one.name for one in names.collections)


async def test_spaces_with_parameters_have_collections_of_their_own(start_proxy, upstream, qdrant):
    """A parameter that changes the numbers changes the collection, too."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a")
    await ask(proxy, "a", task="search")
    told = await arrived(proxy)
    assert told["refused_points"] == 0
    async with Connection(url=qdrant.url) as connection:
        found = await connection.ask(lambda client: client.get_collections())
    assert len(found.collections) == 2


async def test_a_collection_that_was_deleted_is_made_and_filled_again(
    start_proxy, upstream, qdrant
):
    """Whoever deletes a collection gets it back by and by, from hits."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a")
    await arrived(proxy)
    async with Connection(url=qdrant.url) as connection:
        await connection.ask(lambda client: client.delete_collection(COLLECTION))
    await ask(proxy, "b")
    await arrived(proxy)

    async def filled():
        await ask(proxy, "a")
        return len(await qdrant.points(COLLECTION)) == 2

    await until(filled)


async def test_one_of_two_proxies_sends_and_the_other_takes_over(
    start_proxy, upstream, qdrant, tmp_path, monkeypatch
):
    """Both add to one outbox; when the one that sends goes, the other sends."""
    from conftest import StartProxy  # noqa: PLC0415

    other = StartProxy(tmp_path / "cache", monkeypatch)
    first = await other(upstream, index=section(qdrant))
    second = await start_proxy(upstream, index=section(qdrant))
    assert [one.service.indexing.indexer.sending for one in (first, second)] == [True, False]
    await ask(second, "a")
    await arrived(second)
    await other.stop()
    await ask(second, "b")
    await arrived(second)
    assert second.service.indexing.indexer.sending
    assert len(await qdrant.points(COLLECTION)) == 2


async def test_a_folder_serves_as_well_as_a_server(start_proxy, upstream, tmp_path):
    """The embedded mode takes the same points, in a thread of its own."""
    section = {"qdrant": {"path": str(tmp_path / "qdrant")}}
    proxy = await start_proxy(upstream, index=section)
    await ask(proxy, "a", "b", index={"ids": [1, 2]})
    await arrived(proxy)
    await start_proxy.stop()
    async with Connection(path=tmp_path / "qdrant") as connection:
        found = await connection.ask(lambda client: client.retrieve(COLLECTION, [1, 2]))
    assert [one.payload["text"] for one in found] == ["a", "b"]


async def test_a_full_disk_costs_no_request(start_proxy, upstream, qdrant):
    """What the outbox cannot take is answered all the same, counted, and taken the next time."""
    await qdrant.stop()
    proxy = await start_proxy(upstream, index=section(qdrant, outbox_gib=1e-9))
    assert (await ask(proxy, "a")).status == 200
    told = await proxy.service.indexing.indexer.snapshot()
    assert told["since_start"]["dropped"] == 1
    await start_proxy.stop()
    await qdrant.start()
    proxy = await start_proxy(upstream, index=section(qdrant))
    assert (await ask(proxy, "a")).headers["x-cache"] == "hit"
    await arrived(proxy)
    assert len(await qdrant.points(COLLECTION)) == 1


async def test_python_code_says_the_same(start_proxy, upstream, qdrant):
    """`EmbeddingService.embed` takes what the field of a request would say."""
    proxy = await start_proxy(upstream, index=section(qdrant, prefix="my_"))
    await proxy.service.embed(["a"], SMALL, index={"ids": [uuid.UUID(int=5)]})
    await proxy.service.embed(["b"], SMALL, index=False)
    await arrived(proxy)
    assert set(await qdrant.points(f"my_{COLLECTION}")) == {str(uuid.UUID(int=5))}


async def test_without_the_package_the_start_says_which_command_installs_it(
    start_proxy, upstream, qdrant, monkeypatch
):
    """Qdrant is an extra; who has configured it without is told what to do."""
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'qdrant-client>=1.16'")):
        await start_proxy(upstream, index=section(qdrant))


async def test_a_key_that_is_not_set_is_no_start(start_proxy, upstream, qdrant):
    """The variable is named before anything is served."""
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        await start_proxy(upstream, index=section(qdrant, api_key_env="NO_SUCH_KEY"))


async def test_a_key_that_is_refused_keeps_the_points(start_proxy, upstream, qdrant, monkeypatch):
    """Requests are served, nothing is put aside, and the status says what is wrong, without key."""
    monkeypatch.setenv("MY_KEY", "wrong-key")
    qdrant.api_key = "right-key"
    proxy = await start_proxy(upstream, index=section(qdrant, api_key_env="MY_KEY"))
    assert (await ask(proxy, "a")).status == 200

    async def told():
        return (await proxy.service.indexing.indexer.snapshot())["last_failure"]

    await until(told)
    assert "key is not accepted" in await told()
    assert "wrong-key" not in await told()
    qdrant.api_key = "wrong-key"
    assert (await arrived(proxy))["refused_points"] == 0
    assert len(await qdrant.points(COLLECTION)) == 1


async def test_an_outbox_that_cannot_be_made_is_told_in_one_line(
    start_proxy, upstream, qdrant, tmp_path
):
    """A folder in the file's place is a ConfigError, and no traceback."""
    (tmp_path / "cache" / "index-outbox.db").mkdir(parents=True)
    with pytest.raises(ConfigError, match="the outbox cannot be used"):
        await start_proxy(upstream, index=section(qdrant))


async def test_an_outbox_that_fails_costs_no_request(start_proxy, upstream, qdrant, monkeypatch):
    """Whatever the disk does, the answer leaves; what was not kept is tried with the next one."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    broken = Mock(side_effect=sqlite3.OperationalError("disk I/O error"))
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "add", broken)
        assert (await ask(proxy, "a")).status == 200
    assert (await ask(proxy, "a")).headers["x-cache"] == "hit"
    told = await arrived(proxy)
    assert (told["since_start"]["dropped"], told["since_start"]["added"]) == (1, 1)


async def test_an_outbox_that_is_damaged_meanwhile_costs_no_request(
    start_proxy, upstream, qdrant, tmp_path
):
    """It is set aside and counted; what had waited in it comes with its next answer."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    qdrant.always = answer(503, "away")
    assert (await ask(proxy, "a", "b")).status == 200
    folder = tmp_path / "cache"
    for path in folder.glob("index-outbox.db*"):
        with path.open("r+b") as file:
            file.write(b"rubbish " * (path.stat().st_size // 8))
    indexer = proxy.service.indexing.indexer

    async def noticed():
        assert (await ask(proxy, "a", "c")).status == 200
        return (await indexer.snapshot())["since_start"]["damaged"] == 1

    await until(noticed)
    assert len(list(folder.glob("index-outbox.db.damaged-*"))) == 1
    qdrant.always = None
    assert (await ask(proxy, "a", "b", "c")).headers["x-cache"] == "hit"
    await holds(qdrant, 3)
    async with proxy.http.get(proxy.url.removesuffix("/v1") + "/metrics") as response:
        assert "embedding_proxy_index_outbox_corruptions_total " in await response.text()
    told = await arrived(proxy)
    assert (told["since_start"]["dropped"], told["since_start"]["damaged"]) == (0, 1)


async def test_requests_at_once_are_each_indexed(start_proxy, upstream, qdrant):
    """Leaders and joiners of one purchase, and all the others, end as one point an input."""
    proxy = await start_proxy(upstream, index=section(qdrant, batch_mib=0.2))
    asked = [ask(proxy, f"text {n % 20}", "common") for n in range(60)]
    assert {one.status for one in await asyncio.gather(*asked)} == {200}
    await arrived(proxy)
    assert len(await qdrant.points(COLLECTION)) == 21
    assert set(qdrant.waits) == {"true"}
    assert all(size < 0.2 * (1 << 20) for _, path, size in qdrant.requests if "points" in path)


async def test_a_refreshed_vector_replaces_the_old_one(start_proxy, upstream, qdrant):
    """What is bought anew goes to Qdrant again, under the same id."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a")
    await arrived(proxy)
    changed = [1.0] + [0.0] * 1535

    def change(reply):
        reply["data"][0]["embedding"] = changed

    upstream.always = upstream.altered(change)
    response = await proxy.post({"model": SMALL, "input": "a"}, **{"Cache-Control": "no-cache"})
    assert response.status == 200
    await arrived(proxy)
    ((point),) = (await qdrant.points(COLLECTION)).values()
    assert point["vector"] == changed


async def test_token_arrays_that_stand_for_a_text_are_indexed_as_that_text(
    start_proxy, upstream, qdrant
):
    """A text and its ids are one input, so one point; tenants have points of their own."""
    keys = [{"key": "k1", "namespace": "one"}, {"key": "k2", "namespace": "two"}]
    proxy = await start_proxy(upstream, index=section(qdrant), server={"keys": keys})
    for key in ("k1", "k2"):
        for item in ("hello", [15339]):
            body = {"model": SMALL, "input": item}
            assert (await proxy.post(body, Authorization=f"Bearer {key}")).status == 200
    await arrived(proxy)
    payloads = [point["payload"] for point in (await qdrant.points(COLLECTION)).values()]
    assert sorted((one["namespace"], one["text"]) for one in payloads) == [
        ("one", "hello"),
        ("two", "hello"),
    ]


async def test_a_model_that_learns_its_width_is_indexed_from_its_first_answer(
    start_proxy, upstream, qdrant
):
    """The answer that tells a model's width goes to the collection of that width."""
    upstream.widths["unheard-of"] = 12
    proxy = await start_proxy(upstream, index=section(qdrant))
    response = await proxy.post({"model": "unheard-of", "input": ["a", "b"]})
    assert response.status == 200
    await arrived(proxy)
    assert len(await qdrant.points("unheard-of-12")) == 2


async def test_what_was_put_aside_is_tried_again_by_the_next_start(start_proxy, upstream, qdrant):
    """Whoever starts the proxy may have removed what stood against a point."""
    await _foreign(qdrant, "docs")
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", index={"collection": "docs"})
    assert (await arrived(proxy))["refused_points"] == 1
    await start_proxy.stop()
    async with Connection(url=qdrant.url) as connection:
        await connection.ask(lambda client: client.delete_collection("docs"))
    told = await arrived(await start_proxy(upstream, index=section(qdrant)))
    assert told["refused_points"] == 0
    assert len(await qdrant.points("docs")) == 1


def test_a_collection_of_parameters_is_called_as_it_always_was():
    """The label has another form today; a name that an earlier version gave stays the same."""
    space = Space("m", 8).with_parameters({"task": "q", "n": 1})
    name = name_of("m", 8, parameters="n=1&task=%22q%22", prefix="p_")
    assert collection_of("m", space, 8, Qdrant(url="http://h", prefix="p_")) == name


# --- hits that need nothing written --------------------------------------------------------------


async def test_hits_whose_points_are_known_are_given_again(
    start_proxy, upstream, qdrant, *, repeated, at_once
):
    """The same body, and others under the same head; nothing is written for them."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    for user in ("u", "u", "u", "v", "v"):
        assert (await ask(proxy, "a", user=user)).status == 200
    assert (len(repeated), len(at_once)) == (2, 2)
    told = await arrived(proxy)
    assert told["since_start"]["added"] == 1
    assert len(await qdrant.points(COLLECTION)) == 1


async def test_points_that_are_no_longer_known_are_written_again(
    start_proxy, upstream, qdrant, repeated
):
    """As soon as the indexer forgets them, the kept response does not hold."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    for _ in range(3):
        await ask(proxy, "a")
    await arrived(proxy)
    assert repeated
    async with Connection(url=qdrant.url) as connection:
        await connection.ask(lambda client: client.delete_collection(COLLECTION))
    indexer = proxy.service.indexing.indexer
    target = Target(COLLECTION, SPACE, 1536)
    await indexer._on_disk(lambda outbox: outbox.forget(target))
    indexer._forget()
    repeated.clear()
    hits = proxy.service.counters.memory_hits
    assert (await ask(proxy, "a")).headers["x-cache"] == "hit"
    assert proxy.service.counters.memory_hits == hits + 1
    assert not repeated
    await holds(qdrant, 1)

    async def given_again():
        # The indexer sees a moment later, and once, that the outbox has forgotten some.
        await ask(proxy, "a")
        return repeated

    await until(given_again)


@pytest.mark.parametrize(
    "wish", [{"ids": [7]}, {"payload": [{"lang": "en"}]}, {"ids": [7], "payload": [{"lang": "en"}]}]
)
async def test_a_request_that_names_ids_or_payload_is_always_written(
    wish, start_proxy, upstream, qdrant, *, repeated, at_once
):
    """What came in between under the same id may be another's."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a")
    await arrived(proxy)
    for _ in range(3):
        assert (await ask(proxy, "a", index=wish)).headers["x-cache"] == "hit"
    assert not repeated
    assert not at_once
    for other in (wish, {"ids": [7], "payload": [{"lang": "de"}]}, wish):
        await ask(proxy, "b", index=other)
    await arrived(proxy)
    points = await qdrant.points(COLLECTION)
    if "ids" in wish:
        assert points[7]["payload"]["text"] == "b"
        assert points[7]["payload"].get("lang") == wish.get("payload", [{}])[0].get("lang")
    assert not repeated


async def test_another_collection_has_its_own_points(start_proxy, upstream, qdrant, repeated):
    """That a point is known in one says nothing of another; and what is not indexed needs none."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    wishes = [{"collection": "one"}, {"collection": "two"}, False]
    for wish in wishes:
        for _ in range(3):
            assert (await ask(proxy, "a", index=wish)).status == 200
    assert len(repeated) == 1 + 2 + 2
    await arrived(proxy)
    assert [len(await qdrant.points(name)) for name in ("one", "two")] == [1, 1]

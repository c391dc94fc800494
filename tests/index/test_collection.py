"""Collections on a server and in a folder: made as needed, refused when of another space."""

import gc
import re
import ssl
from unittest.mock import Mock

import pytest
from embedding_proxy.index import client as connection
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import (
    CollectionOptions,
    Provenance,
    conflicts,
    ensure,
    look,
    name_of,
)
from embedding_proxy.index.errors import (
    Denied,
    InUse,
    LimitReached,
    Missing,
    OtherSpace,
    Overloaded,
    Rejected,
    ServerFault,
    TooLarge,
    Unavailable,
)
from embedding_proxy.providers.base import Space
from qdrant_client import models
from qdrant_server import REAL, QdrantServer, answer, overloaded

SPLIT = "request larger than rate limiter capacity, please try to split your request"
OVER = 'Limit exceeded 200 > 100 for "upsert limit". Help: Reduce the "upsert limit" parameter'
SMALL = Provenance("openai/text-embedding-3-small", 4)
OTHER = Provenance("openai/text-embedding-ada-002", 4)
WIDER = Provenance("openai/text-embedding-3-small", 8)


@pytest.fixture
async def server():
    async with QdrantServer() as server:
        yield server


@pytest.fixture(params=["server", "folder"])
async def qdrant(request, server, tmp_path):
    """Give a connection to each of the two sorts of Qdrant."""
    place = {"url": server.url} if request.param == "server" else {"path": tmp_path / "qdrant"}
    async with Connection(**place) as connection:
        yield connection


async def test_a_collection_is_made_once_and_says_whose_vectors_it_holds(qdrant):
    """The first call makes it with its provenance, the second finds it."""
    made, found = [await ensure(qdrant, "docs", SMALL) for _ in range(2)]
    assert (made.is_new, found.is_new) == (True, False)
    assert made.identity == found.identity != ""
    assert await look(qdrant, "docs") == (4, SMALL)
    assert await look(qdrant, "nothing") is None


async def test_a_collection_that_an_earlier_version_made_is_still_ours(qdrant):
    """A label that holds values is taken for the same space's of today, and for no other's."""
    space = Space("m", 4).with_parameters({"task": "q"})
    params = models.VectorParams(size=4, distance=models.Distance.COSINE)
    former = {"embedding_proxy": {"space": "m?task=%22q%22", "dimensions": 4, "version": 1}}
    await qdrant.ask(lambda client: client.create_collection("docs", params, metadata=former))
    assert not (await ensure(qdrant, "docs", Provenance(space.label, 4))).is_new
    other = Space("m", 4).with_parameters({"task": "p"})
    with pytest.raises(OtherSpace, match="do not compare"):
        await ensure(qdrant, "docs", Provenance(other.label, 4))


@pytest.mark.parametrize("wanted", [OTHER, WIDER])
async def test_a_collection_of_another_space_or_width_is_refused(qdrant, wanted):
    """Vectors of another space never go in, not even where the width is the same."""
    await ensure(qdrant, "docs", SMALL)
    with pytest.raises(OtherSpace, match="docs holds vectors of"):
        await ensure(qdrant, "docs", wanted, CollectionOptions(adopt=True))


async def test_somebody_elses_collection_is_taken_only_when_told_to(qdrant):
    """Without provenance a collection is refused; with `adopt` it is claimed, once and for all."""
    params = models.VectorParams(size=4, distance=models.Distance.COSINE)
    await qdrant.ask(lambda client: client.create_collection("docs", params))
    with pytest.raises(OtherSpace, match="adopt_unlabeled: true"):
        await ensure(qdrant, "docs", SMALL)
    assert not (await ensure(qdrant, "docs", SMALL, CollectionOptions(adopt=True))).is_new
    with pytest.raises(OtherSpace, match="do not compare"):
        await ensure(qdrant, "docs", OTHER, CollectionOptions(adopt=True))


async def test_a_collection_is_made_as_the_configuration_says(server):
    """Quantization, storage and payload indexes are asked for; a missing index is added later."""
    async with Connection(url=server.url) as qdrant:
        making = CollectionOptions(
            on_disk=True, quantization="scalar", payload_indexes={"lang": "keyword"}
        )
        await ensure(qdrant, "docs", SMALL, making)
        await ensure(qdrant, "docs", SMALL, CollectionOptions(payload_indexes={"year": "integer"}))
        info = await qdrant.ask(lambda client: client.get_collection("docs"))
    assert info.config.params.vectors.on_disk
    assert info.config.quantization_config.scalar.type == "int8"
    assert {name: kind.data_type for name, kind in info.payload_schema.items()} == {
        "lang": "keyword",
        "year": "integer",
    }


@pytest.mark.skipif(REAL is not None, reason="the server at QDRANT_URL keeps it")
async def test_a_server_that_keeps_no_metadata_is_refused_until_told_to_adopt(server):
    """What an old server holds counts as somebody else's: its provenance is lost in silence."""
    server.version = "1.15.5"
    why = "is 1.15, which does not keep whose vectors"
    async with Connection(url=server.url) as qdrant:
        await ensure(qdrant, "docs", SMALL)
        with pytest.raises(OtherSpace, match="adopt"):
            await ensure(qdrant, "docs", SMALL)
        assert not (await ensure(qdrant, "docs", SMALL, CollectionOptions(adopt=True))).is_new
        (said,) = await conflicts(qdrant, {"m": SMALL.space}, CollectionOptions())
        assert why in said
        assert await conflicts(qdrant, {"m": SMALL.space}, CollectionOptions(adopt=True)) == []


@pytest.mark.parametrize(
    ("told", "expected", "lacks"),
    [
        ("1.15.5", (1, 15), [True, True]),
        ("1.16.0", (1, 16), [False, True]),
        ("1.17.1-dev", (1, 17), [False, False]),
        ("v2.0", (2, 0), [False, False]),
        ("unknown", None, [False, False]),
    ],
)
@pytest.mark.skipif(REAL is not None, reason="it has the version that it has")
async def test_what_a_server_is_too_old_for_is_said(told, expected, lacks, server):
    """By its own word; who says nothing is taken for new, and asked no more."""
    server.version = told
    async with Connection(url=server.url) as qdrant:
        assert await connection.version(qdrant) == expected
        found = [await connection.no_metadata(qdrant), await connection.no_insert_only(qdrant)]
    assert [one is not None for one in found] == lacks
    assert all(server.url in one for one in found if one)


async def test_a_gateway_and_a_folder_say_no_version(server, tmp_path):
    """A 404 at the root is no failure, and a folder is as new as the package."""
    server.script.append(answer(404, ""))
    async with Connection(url=server.url) as qdrant:
        assert await connection.version(qdrant) is None
    async with Connection(path=tmp_path / "folder") as qdrant:
        assert await connection.version(qdrant) is None


@pytest.mark.parametrize(
    ("act", "failure", "wait"),
    [
        (overloaded(7), Overloaded, 7),
        (overloaded(None), Overloaded, None),
        (answer(503, "busy", **{"Retry-After": "2"}), Unavailable, 2),
        (answer(500, "panicked"), ServerFault, None),
        (answer(403, "forbidden"), Denied, None),
        (answer(404, "Not found: Collection `x` doesn't exist!"), Missing, None),
        (answer(422, "no such thing"), Rejected, None),
        (answer(413, "too much"), TooLarge, None),
        (answer(429, "Write rate limit exceeded, " + SPLIT), TooLarge, None),
        (
            answer(400, "Payload error: JSON payload (9 bytes) is larger than allowed (limit: 8"),
            TooLarge,
            None,
        ),
        (answer(400, f"Bad request: {OVER}"), TooLarge, None),
        (answer(403, f"Forbidden: {OVER}"), TooLarge, None),
        (answer(507, "full"), LimitReached, None),
        (answer(403, "Forbidden: Max points count limit of 2 reached!"), LimitReached, None),
        (
            answer(400, "Bad request: Max vector storage size limit of 1MB reached!"),
            LimitReached,
            None,
        ),
        (
            answer(
                400, "Disk usage is at 76% of total capacity, exceeding the configured limit of"
            ),
            LimitReached,
            None,
        ),
        (
            answer(500, "Service internal error: No space left on device: WAL buffer"),
            LimitReached,
            None,
        ),
    ],
)
async def test_each_failure_of_a_server_has_its_own_kind(server, act, failure, wait):
    """What passes by itself is told from what does not, and the wait it asks for is kept."""
    server.script.append(act)
    async with Connection(url=server.url) as qdrant:
        with pytest.raises(failure) as raised:
            await qdrant.ask(lambda client: client.get_collections())
    assert type(raised.value) is failure
    assert getattr(raised.value, "retry_after_s", None) == wait


async def test_a_server_that_is_away_is_unavailable_until_it_is_back(server):
    """A refused connection passes by itself."""
    async with Connection(url=server.url) as qdrant:
        await server.stop()
        place = re.escape(server.url.removeprefix("http://"))
        doing = "reading the configuration of docs"
        with pytest.raises(Unavailable, match=f"^connection refused by {place} while {doing}$"):
            await look(qdrant, "docs")
        await server.start()
        assert await look(qdrant, "docs") is None


async def test_the_key_comes_from_the_environment_and_is_never_told(server, monkeypatch):
    """A wrong key is denied without its name, one that is absent names its variable."""
    server.api_key = "right-key"
    with pytest.raises(Denied, match="MY_KEY"):
        async with Connection(url=server.url, api_key_env="MY_KEY"):
            pass
    monkeypatch.setenv("MY_KEY", "two\nlines")
    with pytest.raises(Denied, match="no key"):
        async with Connection(url=server.url, api_key_env="MY_KEY"):
            pass
    for key in ("wrong-key", "right-key"):
        monkeypatch.setenv("MY_KEY", key)
        async with Connection(url=server.url, api_key_env="MY_KEY") as qdrant:
            if key == "right-key":
                assert await look(qdrant, "docs") is None
                continue
            with pytest.raises(Denied) as raised:
                await look(qdrant, "docs")
            assert key not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "read"), [("http://h:1", False), ("HTTP://h:1", False), ("https://h:1", True)]
)
async def test_certificates_are_read_only_for_tls(url, read, monkeypatch):
    """An address without TLS is opened without the time that reading them takes."""
    reading = Mock(wraps=ssl.create_default_context)
    monkeypatch.setattr("ssl.create_default_context", reading)
    async with Connection(url=url):
        assert reading.called == read


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_folder_is_open_in_one_place_only_and_keeps_what_it_was_given(tmp_path):
    """A second connection to the folder is told that it is in use; closed, it can be opened."""
    async with Connection(path=tmp_path) as qdrant:
        await ensure(qdrant, "docs", SMALL)
        with pytest.raises(InUse, match="only one"):
            async with Connection(path=tmp_path):
                pass
    gc.collect()  # the library leaves the lock's file open, and it is closed here
    async with Connection(path=tmp_path) as qdrant:
        assert await look(qdrant, "docs") == (4, SMALL)


def test_a_name_holds_nothing_that_qdrant_refuses():
    """A model's slashes become underscores; spaces with parameters have names of their own."""
    assert name_of("openai/a b", 8) == "openai_a_b-8"
    assert name_of("m", 8, parameters="a=1") != name_of("m", 8, parameters="a=2")
    assert len(name_of("m" * 300, 8, parameters="a=1")) <= 255

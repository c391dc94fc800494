"""What code of one's own asks a service: how alike, what is nearest, what Qdrant holds of it."""

import asyncio

import numpy as np
import pytest
from conftest import no_wait
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import CollectionOptions, Provenance, ensure
from embedding_proxy.index.errors import InUse, Missing, OtherSpace
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from fault_server import vector_of
from qdrant_server import QdrantServer

SMALL = "text-embedding-3-small"
ADA = "text-embedding-ada-002"
LOCAL = "wordllama-embed"


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server:
        yield server


@pytest.fixture
async def open_service(tmp_path, upstream, monkeypatch):
    """Give a function that makes a service in front of the upstream and of Qdrant."""
    monkeypatch.setenv("OPENAI_API_KEY", "openai-key")

    def make(index=None, **sections):
        provider = {"kind": "openai", "base_url": upstream.url}
        content = {
            "cache": {"directory": str(tmp_path)},
            "providers": {"openai": provider},
            "index": {"qdrant": index},
            **sections,
        }
        return EmbeddingService(Settings.model_validate(content), sleep=no_wait)

    return make


async def _indexed(service):
    """Wait until all that was answered is in Qdrant."""
    async with asyncio.timeout(60):
        while (await service.indexing.indexer.snapshot())["backlog_points"]:  # noqa: ASYNC110 - a disk and a socket
            await asyncio.sleep(0.01)


def _cosine(one, other):
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


async def test_how_alike_two_texts_are(open_service):
    """The cosine of their vectors, at the width that is asked for."""
    one, other = (vector_of(SMALL, text)[:64].astype(np.float64) for text in ("a", "b"))
    async with open_service() as service:
        assert await service.similarity("a", "b", SMALL, dimensions=64) == pytest.approx(
            _cosine(one, other), abs=1e-6
        )
        assert await service.similarity("a", "a", SMALL) == 1.0


async def test_a_result_compares_with_itself_and_with_others(open_service):
    """Each text with each, and never over two spaces or widths."""
    async with open_service() as service:
        three = await service.embed(["a", "b", "c"], SMALL)
        two = await service.embed(["c", "d"], SMALL)
        others = [await service.embed("a", SMALL, dimensions=64), await service.embed("a", ADA)]
    assert np.allclose(three.similarity(), three.vectors @ three.vectors.T, atol=1e-5)
    alike = three.similarity(two)
    assert alike.shape == (3, 2)
    assert alike[2, 0] == 1
    assert alike[0, 1] == pytest.approx(
        _cosine(vector_of(SMALL, "a"), vector_of(SMALL, "d")), abs=1e-6
    )
    for other in others:
        with pytest.raises(ValueError, match=r"^vectors of two spaces do not compare: openai"):
            three.similarity(other)


async def test_the_nearest_texts_of_a_query(open_service):
    """The nearest first, no more than there are, and of equals the earlier."""
    texts = ["Bicycles are parked behind the wing.", "Lunch is at noon.", "Lunch is at noon."]
    async with open_service() as service:
        found = await service.nearest("When is lunch?", texts, 2, LOCAL)
        assert [(one.place, one.text) for one in found] == [(1, texts[1]), (2, texts[2])]
        assert found[0].score == pytest.approx(
            await service.similarity("When is lunch?", texts[1], LOCAL), abs=1e-6
        )
        assert len(await service.nearest("When is lunch?", texts, 9, LOCAL)) == 3
        assert await service.nearest("q", [], 3, LOCAL) == []
        assert await service.nearest("q", texts, 0, LOCAL) == []


async def test_a_query_finds_what_was_indexed(open_service, qdrant):
    """By the vector of its text, with payloads, within a filter; the query is not indexed."""
    async with open_service({"url": qdrant.url, "prefix": "p_"}) as service:
        payload = [{"lang": "en"}, {"lang": "de"}]
        await service.embed(["a", "b"], SMALL, index={"payload": payload})
        await _indexed(service)
        first, second = await service.query("b", SMALL)
        assert (first.text, first.payload["lang"]) == ("b", "de")
        assert first.score == pytest.approx(1, abs=1e-5)
        assert second.text == "a"
        assert second.score == pytest.approx(
            _cosine(vector_of(SMALL, "a"), vector_of(SMALL, "b")), abs=1e-5
        )
        assert [one.text for one in await service.query("a", SMALL, 1)] == ["a"]
        english = {"must": [{"key": "lang", "match": {"value": "en"}}]}
        assert [one.text for one in await service.query("b", SMALL, where=english)] == ["a"]
        assert [one.text for one in await service.query("c", SMALL, 1)] != ["c"]
        await _indexed(service)
    assert len(await qdrant.points(f"p_{SMALL}-1536")) == 2


async def test_a_query_meets_its_own_width_and_parameters_alone(open_service, qdrant):
    """Each has a collection of its own; what the documents were told, the query says of them."""
    async with open_service({"url": qdrant.url}) as service:
        document, query = {"input_type": "document"}, {"input_type": "query"}
        await service.embed("narrow", SMALL, dimensions=64)
        await service.embed("told", SMALL, parameters=document)
        await _indexed(service)
        assert [one.text for one in await service.query("a", SMALL, dimensions=64)] == ["narrow"]
        with pytest.raises(Missing, match="there is no collection"):
            await service.query("a", SMALL)
        with pytest.raises(Missing, match="there is no collection"):
            await service.query("a", SMALL, parameters=query)
        (found,) = await service.query("a", SMALL, parameters=query, stored=document)
        assert found.text == "told"


async def test_a_collection_of_another_space_is_never_searched(open_service, qdrant):
    """Not one of the same width, not by an alias, not one that says nothing of itself."""
    async with Connection(url=qdrant.url) as connection:
        await ensure(connection, "other", Provenance("vendor/else", 1536), CollectionOptions())
        await ensure(connection, "wide", Provenance(f"openai/{SMALL}", 3072), CollectionOptions())
        await connection.ask(
            lambda client: client.create_collection(
                "mute", vectors_config={"size": 1536, "distance": "Cosine"}
            )
        )
    async with open_service({"url": qdrant.url}) as service:
        for name, why in {
            "other": "holds vectors of vendor/else at 1536",
            "wide": "holds vectors of 3072 dimensions",
            "mute": "does not say whose vectors it holds",
        }.items():
            with pytest.raises(OtherSpace, match=why):
                await service.query("a", SMALL, collection=name)
    assert not any(path.endswith("/query") for _, path, _ in qdrant.requests)
    async with open_service({"url": qdrant.url, "adopt_unlabeled": True}) as service:
        assert await service.query("a", SMALL, collection="mute") == []


async def test_the_vectors_of_a_stand_in_search_nothing(open_service, qdrant, upstream):
    """A query that another model answered is an error, and no search with a wrong vector."""
    stand_in = {"space": "vendor/else", "dimensions": 1536}
    local = {
        **stand_in,
        "dimension_policy": "pad",
        "dimensions": 256,
        "routes": [{"provider": "local", "model": LOCAL}],
    }
    models = {SMALL: {"fallback": [{"model": "other", "dimension_policy": "pad"}]}, "other": local}
    index = {"url": qdrant.url, "collection": "all"}
    async with open_service(index, models=models) as service:
        await service.embed("a", SMALL)
        await _indexed(service)
        await upstream.stop()
        with pytest.raises(OtherSpace, match=f"other stood in for {SMALL}"):
            await service.query("unheard of", SMALL, stored={})
    assert not any(path.endswith("/query") for _, path, _ in qdrant.requests)


async def test_several_processes_can_ask(open_service, qdrant):
    """One that does not send has a connection of its own; a folder has only the sender's."""
    async with (
        open_service({"url": qdrant.url}) as service,
        open_service({"url": qdrant.url}) as other,
    ):
        await service.embed("a", SMALL)
        await _indexed(service)
        assert [one.indexing.indexer.sending for one in (service, other)] == [True, False]
        found = await asyncio.gather(*(other.query("a", SMALL) for _ in range(3)))
        assert [len(points) for points in found] == [1, 1, 1]


async def test_a_folder_is_asked_through_who_has_it_open(open_service, tmp_path):
    """In the embedded mode the sender's connection answers, and no second one is tried."""
    index = {"path": str(tmp_path / "folder")}
    async with open_service(index) as service, open_service(index) as other:
        await service.embed("a", SMALL)
        await _indexed(service)
        (found,) = await service.query("a", SMALL)
        assert found.text == "a"
        with pytest.raises(InUse, match="the folder is the sending process's"):
            await other.query("a", SMALL)


async def test_without_qdrant_there_is_nothing_to_search(open_service):
    """The error names the key, before anything is bought."""
    async with open_service() as service:
        with pytest.raises(ConfigError, match=r"^index\.qdrant: is not set"):
            await service.query("a", SMALL)
        assert service.counters.misses == 0

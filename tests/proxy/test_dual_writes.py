"""While a collection is migrated with --dual-write, answers go to both: by HTTP and commands."""

import asyncio
import json

import numpy as np
import pytest
from fault_server import vector_of
from index_helpers import COLLECTION, SMALL, arrived, ask, holds, section, until
from qdrant_client import models
from qdrant_server import QdrantServer

LARGE = "text-embedding-3-large"
NEW = f"{COLLECTION}__{LARGE}-3072"


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server:
        yield server


@pytest.fixture
def migrate(upstream, qdrant, tmp_path, command):
    """Give a function that runs a step on the proxy's own Qdrant and cache."""
    upstream.widths[LARGE] = 3072
    sections = {
        "providers": {"openai": {"base_url": upstream.url}},
        "cache": {"directory": str(tmp_path / "cache")},
        "index": section(qdrant),
    }
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(sections))

    async def migrate(step, *arguments):
        arguments = (step, COLLECTION, *arguments, "--config", str(config))
        return await asyncio.to_thread(command, "migrate", *arguments)

    return migrate


@pytest.fixture
async def proxy(start_proxy, upstream, qdrant, monkeypatch):
    """Give a proxy that looks into the state files for each answer."""
    monkeypatch.setattr("embedding_proxy.proxy.service.dual_writes.REFRESH_S", 0)
    monkeypatch.setattr("embedding_proxy.index.migration.cutover.DUAL_WRITE_END_S", 0)
    return await start_proxy(upstream, index=section(qdrant))


async def _is_of(qdrant, name, model, width):
    """Return the texts of a collection, once each vector has been found to be of its text."""
    texts = {}
    for one, point in (await qdrant.points(name)).items():
        texts[one] = point["payload"]["text"]
        expected = vector_of(model, texts[one], width)
        assert np.allclose(point["vector"], expected / np.linalg.norm(expected), atol=1e-5)
    return texts


async def test_answers_go_to_both_until_the_end(proxy, migrate, qdrant):
    """Before the cutover and after it, each with its own vectors; a way back loses nothing."""
    await ask(proxy, "a", "b")
    await arrived(proxy)
    done = await migrate("run", "--to", LARGE, "--dual-write")
    assert (done.code, done.err) == (0, "")
    assert "the proxy writes what it indexes to both" in done.out

    await ask(proxy, "c", index={"ids": [7], "payload": [{"lang": "en"}]})
    await ask(proxy, "d")
    await holds(qdrant, 4)
    await holds(qdrant, 4, NEW)
    old = await _is_of(qdrant, COLLECTION, SMALL, 1536)
    assert await _is_of(qdrant, NEW, LARGE, 3072) == old
    assert (await qdrant.points(NEW))[7]["payload"]["lang"] == "en"

    done = await migrate("cutover", "--alias", "live")
    assert (done.code, done.err) == (0, "")
    assert (await proxy.post({"model": LARGE, "input": ["e"]})).status == 200
    await holds(qdrant, 5)
    await holds(qdrant, 5, NEW)
    old = await _is_of(qdrant, COLLECTION, SMALL, 1536)
    assert await _is_of(qdrant, NEW, LARGE, 3072) == old
    done = await migrate("rollback")
    assert (done.code, "lacks" in done.out) == (0, False)

    assert (await migrate("run", "--to", LARGE)).code == 0
    assert (await migrate("cutover")).code == 0
    assert (await migrate("finalize", "--yes", "--yes")).code == 0
    await proxy.post({"model": LARGE, "input": ["f"]})
    await holds(qdrant, 6, NEW)
    assert (await arrived(proxy))["refused"] == []
    assert await qdrant.points(COLLECTION) == {}


async def test_without_the_option_nothing_is_bought_twice(proxy, migrate, qdrant, upstream):
    """Nor is what `Cache-Control: no-store` or `index: false` keeps out of the index."""
    await ask(proxy, "a")
    await arrived(proxy)
    assert (await migrate("run", "--to", LARGE)).code == 0
    seen = len(upstream.inputs)
    await ask(proxy, "b")
    await arrived(proxy)
    assert len(upstream.inputs) == seen + 1
    assert (await migrate("run", "--to", LARGE, "--dual-write")).code == 0
    seen = len(upstream.inputs)
    await ask(proxy, "c", index=False)
    await proxy.post({"model": SMALL, "input": "d"}, **{"cache-control": "no-store"})
    # One that is written to both shows that the others would have been, too.
    await ask(proxy, "e")

    async def bought():
        return len(upstream.inputs) >= seen + 4

    await until(bought)
    assert upstream.inputs[seen:].count("e") == 2
    assert len(upstream.inputs) == seen + 4


async def test_what_cannot_be_written_twice_is_refused(proxy, migrate, qdrant):
    """A collection whose old model nobody knows."""
    client = qdrant.client()
    params = {"size": 4, "distance": "Cosine"}
    await asyncio.to_thread(client.create_collection, COLLECTION, models.VectorParams(**params))
    point = models.PointStruct(id=1, vector=[1.0, 2, 3, 4], payload={"content": "a"})
    await asyncio.to_thread(client.upsert, COLLECTION, [point])
    done = await migrate("run", "--to", LARGE, "--dual-write")
    assert done.code == 1
    assert "has to know the model of the old vectors" in done.err
    client.close()

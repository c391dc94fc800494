"""After a migration answers go to where its aliases point, by the commands and over HTTP."""

import asyncio
import json

import pytest
from index_helpers import COLLECTION, SMALL, arrived, ask, section, until
from qdrant_client import models
from qdrant_server import QdrantServer

LARGE = "text-embedding-3-large"
NEW = f"{COLLECTION}__{LARGE}-3072"


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _widths(upstream):
    upstream.widths[LARGE] = 3072


@pytest.fixture
async def migrated(start_proxy, upstream, qdrant, tmp_path, command):
    """Give a function that migrates what answers were indexed into, and ends as it is told to."""

    async def migrate(*finalize, into=()):
        proxy = await start_proxy(upstream, index=section(qdrant))
        await ask(proxy, "a", "b", "c")
        await arrived(proxy)
        await start_proxy.stop()
        sections = {
            "providers": {"openai": {"base_url": upstream.url}},
            "cache": {"directory": str(tmp_path / "cache")},
            "index": section(qdrant),
        }
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps(sections))
        steps = [
            ("run", COLLECTION, "--to", LARGE, "--text-field", "text", *into),
            ("cutover", COLLECTION, "--alias", "live"),
            ("finalize", COLLECTION, "--yes", "--yes", *finalize),
        ]
        for step in steps if finalize else steps[:2]:
            done = await asyncio.to_thread(command, "migrate", *step, "--config", str(config))
            assert done.code == 0, done.err

    return migrate


async def _names(qdrant):
    found = await asyncio.to_thread(lambda: qdrant.client().get_collections())
    return {one.name for one in found.collections}


@pytest.mark.parametrize(
    ("finalize", "into"), [((), ()), (("--take-name",), ()), (("--take-name",), ("--into", "new"))]
)
async def test_new_answers_go_to_where_the_alias_points(  # noqa: PLR0917 - fixtures
    finalize, into, migrated, start_proxy, upstream, qdrant
):
    """With the name taken the proxy starts, and what the first model gives is kept apart."""
    await migrated(*finalize, into=into)
    new = into[1] if into else NEW
    proxy = await start_proxy(upstream, index=section(qdrant))
    old = f"{COLLECTION}-2" if finalize else COLLECTION
    for model in (LARGE, SMALL):
        assert (await proxy.post({"model": model, "input": ["a", "d"]})).status == 200
    assert (await arrived(proxy))["refused"] == []

    async def there():
        # `a` was known to be in the collection that is no longer of its space.
        await ask(proxy, "a", "d")
        return len(await qdrant.points(old)) == (2 if finalize else 4)

    await until(there)
    texts = sorted(one["payload"]["text"] for one in (await qdrant.points(new)).values())
    # The point of `a` has the id of the first space, and now also that of the second.
    assert texts == ["a", "a", "b", "c", "d"]
    texts = {one["payload"]["text"] for one in (await qdrant.points(old)).values()}
    assert texts == ({"a", "d"} if finalize else {*"abcd"})
    assert await _names(qdrant) == {new, old}
    (hit, *_) = await proxy.service.query("d", LARGE)
    assert hit.text == "d"


async def test_before_the_cutover_answers_go_where_they_went(start_proxy, upstream, qdrant):
    """A migrated collection without an alias is none to write to: it is not ready."""
    from embedding_proxy.index.client import Connection  # noqa: PLC0415
    from embedding_proxy.index.collection import Provenance, ensure  # noqa: PLC0415

    wanted = Provenance(f"openai/{LARGE}", 3072, "{text}", origin=COLLECTION)
    async with Connection(url=qdrant.url) as connection:
        await ensure(connection, NEW, wanted)
    proxy = await start_proxy(upstream, index=section(qdrant))
    await proxy.post({"model": LARGE, "input": "a"})
    await arrived(proxy)
    assert (await qdrant.points(NEW), len(await qdrant.points(f"{LARGE}-3072"))) == ({}, 1)


async def test_an_alias_of_somebody_elses_collection_attracts_nothing(
    start_proxy, upstream, qdrant
):
    """A collection that requests name may have an alias, and is no place for other answers."""
    proxy = await start_proxy(upstream, index=section(qdrant))
    await ask(proxy, "a", index={"collection": "docs"})
    await arrived(proxy)
    made = models.CreateAlias(collection_name="docs", alias_name="live")
    change = [models.CreateAliasOperation(create_alias=made)]
    await asyncio.to_thread(lambda: qdrant.client().update_collection_aliases(change))
    await ask(proxy, "b")
    await arrived(proxy)
    assert [len(await qdrant.points(name)) for name in ("docs", COLLECTION)] == [1, 1]

"""What tests of indexing over HTTP share: a request, and the wait until its points have arrived."""

import asyncio

SMALL = "text-embedding-3-small"
COLLECTION = f"{SMALL}-1536"
SPACE = f"openai/{SMALL}"


async def until(condition):
    """Ask again and again, until what is awaited is the case."""
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110 - it happens on a disk and behind a socket
            await asyncio.sleep(0.01)


async def arrived(proxy) -> dict:
    """Wait until nothing is in the outbox; return the snapshot."""
    indexer = proxy.service.indexing.indexer

    async def empty():
        return not (await indexer.snapshot())["backlog_points"]

    await until(empty)
    return await indexer.snapshot()


async def holds(qdrant, count, collection=COLLECTION):
    """Wait until the collection has so many points."""

    async def full():
        return len(await qdrant.points(collection)) == count

    await until(full)


def section(qdrant, **more):
    """Return the section `index` of a configuration."""
    return {"qdrant": {"url": qdrant.url, **more}}


async def ask(proxy, *texts, **fields):
    """Return the response to a request for texts."""
    return await proxy.post({"model": SMALL, "input": list(texts), **fields})

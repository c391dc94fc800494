"""Proxies with a folder each, in front of one upstream, that share a Redis."""

import numpy as np
from fault_server import vector_of
from redis_server import until

MODEL = {"space": "s/m", "dimensions": 8, "price": 2.0, "routes": [
    {"provider": "openai", "model": "m"}]}  # fmt: skip
PATIENT = {"timeout_ms": 1000}


class Nodes:
    """Proxies with a folder each, in front of one upstream and one Redis, which is at `url`."""

    def __init__(self, start, upstream, url, folder):
        upstream.widths = {"m": 8}
        self._start, self._upstream, self._url, self._folder = start, upstream, url, folder

    async def start(self, name, *, shared=(), cache=(), **sections):
        url = {"url": self._url, **PATIENT, **dict(shared)}
        folder = {"directory": str(self._folder / name), "shared": url, **dict(cache)}
        proxy = await self._start(
            openai=self._upstream, models={"m": MODEL}, cache=folder, **sections
        )
        await until(lambda: tier(proxy).is_available)
        return proxy


async def ask(proxy, texts, **headers):
    """Return the vectors of some texts, and the value of x-cache."""
    reply = await proxy.post({"model": "m", "input": texts}, **headers)
    assert reply.status == 200
    vectors = [np.array(one["embedding"], "<f4") for one in (await reply.json())["data"]]
    return vectors, reply.headers["x-cache"]


def is_right(vectors, texts):
    return all(
        np.array_equal(one, vector_of("m", text, 8))
        for one, text in zip(vectors, texts, strict=True)
    )


def tier(proxy):
    return proxy.service.storage.shared


async def filled(proxy, texts):
    """Have a proxy buy some texts, and wait until they are in the shared tier."""
    vectors, _ = await ask(proxy, texts)
    await tier(proxy).flush()
    return vectors

"""What a reply cost is on disk before it leaves: in every mode, whatever the answer was worth."""

import signal

import aiohttp
import pytest
from embedding_proxy.cache import embedder
from embedding_proxy.cache.disk import connection, ledger_reader
from embedding_proxy.cache.ledger import By, Usage
from embedding_proxy.proxy.service import drift_check
from fault_server import status, tokens_of
from own_process import own_process

MODEL = "text-embedding-3-small"
GIB = 1 << 30
COST = 37
"""Nanodollars a token, as the upstream charges it."""


def costing(server, spoil=lambda _: None):
    """Play answers that say what they cost, and that may be bad."""

    def change(reply):
        reply["usage"]["cost"] = reply["usage"]["total_tokens"] * COST / 1e9
        spoil(reply["data"])

    return server.altered(change)


def no_vectors(data):
    """Spoil all vectors of an answer."""
    for item in data:
        item["embedding"] = None


async def killed_after(directory, upstream, mode, body, **headers):
    """Run the proxy as a process of its own, kill it after one reply, and read its ledger."""
    async with own_process(directory, upstream, mode) as (process, url):
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/embeddings", json=body, headers=headers) as response,
        ):
            await response.read()
        process.send_signal(signal.SIGKILL)
    with connection.opened(directory / "cache", GIB) as file:
        sums = dict(ledger_reader.read(file.sql, [By.PROVIDER]))
    return response, sums.get(("openai",), Usage())


@pytest.mark.parametrize(
    ("mode", "headers"),
    [
        ("normal", {}),
        ("off", {}),
        ("normal", {"Cache-Control": "no-store"}),
        ("refresh", {"Cache-Control": "no-store"}),
    ],
    ids=["normal", "off", "no-store", "refresh, no-store"],
)
async def test_killed_right_after_a_reply(mode, headers, tmp_path, upstream):
    """After kill -9 the ledger has what the upstream charged, also where nothing may be kept."""
    upstream.always = costing(upstream)
    inputs = [f"input number {i}" for i in range(300)]
    body = {"model": MODEL, "input": inputs}
    response, bill = await killed_after(tmp_path, upstream, mode, body, **headers)
    charged = sum(map(tokens_of, upstream.inputs))
    assert (response.status, sorted(upstream.inputs)) == (200, sorted(inputs))
    assert (bill.tokens_billed, bill.nanodollars_billed) == (charged, charged * COST)
    assert bill.misses == 300


@pytest.mark.parametrize("mode", ["normal", "off"])
@pytest.mark.parametrize("model", [MODEL, "text-embedding-9"], ids=["known", "new"])
async def test_a_refused_answer_is_billed_before_its_error_leaves(
    mode, model, upstream, start_proxy
):
    """An upstream charges for vectors that no check lets through, one of unknown width, too."""
    upstream.always = costing(upstream, no_vectors)
    proxy = await start_proxy(openai=upstream, cache={"mode": mode})
    assert (await proxy.post({"model": model, "input": "a b c"})).status == 502
    ((_, bill),) = await proxy.service.ledger([])
    charged = sum(map(tokens_of, upstream.inputs))
    assert (bill.tokens_billed, bill.nanodollars_billed) == (charged, charged * COST)
    assert bill.misses == 0


async def test_a_new_model_is_billed_where_nothing_is_kept(upstream, start_proxy):
    """The request that tells the width, and the rest of the inputs after it."""
    upstream.always = costing(upstream)
    proxy = await start_proxy(openai=upstream, cache={"mode": "off"})
    reply = await proxy.post({"model": "text-embedding-9", "input": ["a", "b c"]})
    ((_, bill),) = await proxy.service.ledger([])
    assert (reply.status, bill.tokens_billed, bill.misses) == (200, 3, 2)


async def test_canaries_are_billed_at_once(upstream, start_proxy):
    """They are kept nowhere, and have no reply: their charge is written by itself."""
    upstream.always = costing(upstream)
    proxy = await start_proxy(openai=upstream)
    assert (await proxy.post({"model": MODEL, "input": "a"})).status == 200
    await proxy.service.drift_check.check()
    await proxy.service._registry.in_flight.close()
    bills = dict(await proxy.service.ledger([By.NAMESPACE]))
    charged = sum(map(tokens_of, upstream.inputs)) - tokens_of("a")
    assert len(upstream.calls) == 3
    assert bills[drift_check.NAMESPACE,].tokens_billed == charged


async def test_a_disk_that_takes_nothing_holds_no_request(upstream, start_proxy):
    """The reply leaves; what was counted waits in memory, as records do."""
    proxy = await start_proxy(openai=upstream, cache={"mode": "off"})
    store = proxy.service._storage.store
    for _ in range(3):
        store._writer.backoff.fail()
    assert not store._writer.ready
    assert (await proxy.post({"model": MODEL, "input": "a"})).status == 200
    assert await proxy.service.ledger([]) == []
    store._writer.backoff.succeed()
    assert await store.flush_counts()
    ((_, bill),) = await proxy.service.ledger([])
    assert bill.tokens_billed == tokens_of("a")


@pytest.mark.parametrize("control", ["only-if-cached", ""], ids=["not cached", "refused"])
async def test_a_large_request_that_fails_has_saved_nothing(
    control, upstream, start_proxy, monkeypatch
):
    """As for a small one: hits in slices before the failure were given to nobody."""
    monkeypatch.setattr(embedder, "MAX_FETCH", 4)
    monkeypatch.setattr(embedder, "SLICE", 2)
    proxy = await start_proxy(openai=upstream)
    known = [f"known {i}" for i in range(10)]
    assert (await proxy.post({"model": MODEL, "input": known})).status == 200
    upstream.holding["bad"] = status(400, {"error": {"message": "no"}})
    body = {"model": MODEL, "input": [*known, "bad", *known]}
    reply = await proxy.post(body, **{"Cache-Control": control})
    assert reply.status == (504 if control else 400)
    del upstream.holding["bad"]
    assert (await proxy.post(body)).headers["x-cache-hits"] == "10"
    await proxy.service._storage.store.flush_counts()
    ((_, sums),) = await proxy.service.ledger([])
    assert (sums.hits, sums.misses, sums.duplicates) == (10, 11, 10)
    counted = sum(map(tokens_of, [*known, "bad"]))
    assert sums.tokens_billed == counted

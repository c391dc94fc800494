"""What a reply cost is on disk before it leaves: in every mode, whatever the answer was worth."""

import asyncio
import os
import signal
import sys

import aiohttp
import pytest
from fault_server import tokens_of

from cache import ledger
from cache.disk import connection
from cache.ledger import By
from cache.usage import Usage
from proxy.embedding import canary

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
    config = directory / "config.yaml"
    config.write_text(
        f"cache: {{directory: {directory / 'cache'}, mode: '{mode}'}}\n"
        f"providers: {{openai: {{base_url: '{upstream.url}'}}}}\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--port", "0", "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "OPENAI_API_KEY": "k"},
    )
    try:
        line = (await process.stdout.readline()).decode().strip()
        url = line.removeprefix("export OPENAI_BASE_URL=")
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{url}/embeddings", json=body, headers=headers) as response:
                await response.read()
            process.send_signal(signal.SIGKILL)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    with connection.opened(directory / "cache", GIB) as file:
        sums = dict(ledger.read(file.sql, [By.PROVIDER]))
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
    await proxy.service.canaries.look()
    await proxy.service._registry._flights.close()
    bills = dict(await proxy.service.ledger([By.NAMESPACE]))
    charged = sum(map(tokens_of, upstream.inputs)) - tokens_of("a")
    assert len(upstream.calls) == 3
    assert bills[canary.NAMESPACE,].tokens_billed == charged


async def test_a_disk_that_takes_nothing_holds_no_request(upstream, start_proxy):
    """The reply leaves; what was counted waits in memory, as records do."""
    proxy = await start_proxy(openai=upstream, cache={"mode": "off"})
    store = proxy.service._store
    for _ in range(3):
        store._writer.rest.failed()
    assert not store._writer.ready
    assert (await proxy.post({"model": MODEL, "input": "a"})).status == 200
    assert await proxy.service.ledger([]) == []
    store._writer.rest.succeeded()
    assert await store.flush_counts()
    ((_, bill),) = await proxy.service.ledger([])
    assert bill.tokens_billed == tokens_of("a")

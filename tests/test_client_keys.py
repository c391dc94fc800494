"""`auth: client`: each client pays with its own key, and is served what that key may have."""

import asyncio
import json
import logging
import sqlite3
import stat
import sys
import time
from contextlib import closing
from functools import partial

import numpy as np
import openai
import pytest
from aiohttp import web
from any_server import AnyServer
from clock import until
from conftest import no_wait
from embedding_proxy.providers import registry
from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.client_credential import Credential
from embedding_proxy.providers.errors import ClientKeyRefused
from embedding_proxy.providers.profile import Profile
from embedding_proxy.providers.route_check import call_route
from embedding_proxy.providers.routing import health
from embedding_proxy.proxy.cli import main
from embedding_proxy.proxy.cli.migrate_options import Target, find_model
from embedding_proxy.proxy.config.loader import load
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service import client_keys, provider_factory
from embedding_proxy.proxy.service import client_keys as client_secret
from embedding_proxy.proxy.service import client_keys as proofs
from embedding_proxy.proxy.service.client_keys import ClientKeyPolicy, KeyStatus, Proofs
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from fault_server import hang, status, tokens_of, vector_of
from qdrant_server import QdrantServer

MODEL = "text-embedding-3-small"
ANNE, BERT = "sk-anne-0123456789", "sk-bert-0123456789"


def _bearer(key):
    return {"Authorization": f"Bearer {key}"}


def _theirs(upstream, **more):
    """Return the section of a provider that is asked with clients' keys."""
    return {"base_url": upstream.url, "auth": "client", **more}


def _keys(upstream):
    """Return the keys with which an upstream was asked."""
    return [call.headers["Authorization"].removeprefix("Bearer ") for call in upstream.calls]


def _refusing(upstream, *keys, code=401, message=None):
    """Play an upstream that does not accept some keys, and repeats them."""

    async def act(request, payload):
        key = request.headers["Authorization"].removeprefix("Bearer ")
        if key not in keys:
            return await status(200, upstream.reply(payload))(request, payload)
        told = message or f"Incorrect API key provided: {key}, {key[:7]}***{key[-4:]}."
        error = {"message": told, "type": "invalid_request_error", "code": "invalid_api_key"}
        return await status(code, {"error": error})(request, payload)

    return act


async def _ask(proxy, key, text="a", **headers):
    keys = _bearer(key) if key else {}
    return await proxy.post({"model": MODEL, "input": text}, **keys, **headers)


async def _called(upstream, calls):
    """Wait until an upstream has seen so many calls."""
    await until(lambda: len(upstream.calls) >= calls)


async def _a_while():
    """Let everything that can go on do so."""
    for _ in range(300):
        await asyncio.sleep(0)


def _at(proxy):
    return proxy.service._answering._client_keys


async def _namespaces(proxy):
    return {name for (name,), _ in await proxy.service.ledger(["namespace"])}


@pytest.fixture
def run_cli(tmp_path, monkeypatch, capsys):
    """Give a function that runs a command on the cache of the test, and returns what it prints."""
    config = tmp_path / "c.json"

    async def run(*arguments, code=0, **sections):
        sections = {"cache": {"directory": str(tmp_path / "cache")}, **sections}
        config.write_text(json.dumps(sections))
        line = ["embedding-proxy", *map(str, arguments), "--config", str(config)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as caught:
            await asyncio.to_thread(main.main)
        told = "".join(capsys.readouterr())
        assert (caught.value.code or 0) == code, told
        return told

    return run


@pytest.fixture
def start(start_proxy, upstream):
    """Give a function that starts a proxy whose provider openai is asked with clients' keys."""

    async def begin(*, share=False, more=None, **sections):
        providers = {"openai": _theirs(upstream, share_cache=share), **(more or {})}
        return await start_proxy(providers=providers, **sections)

    return begin


async def test_each_key_buys_for_itself(start, upstream):
    """Two official clients with two keys buy the same text twice, and are served only their own."""
    proxy = await start()
    for key in (ANNE, BERT):
        async with openai.AsyncOpenAI(base_url=proxy.url, api_key=key, max_retries=0) as client:
            for _ in range(2):
                reply = await client.embeddings.create(
                    model=MODEL, input=["a", "bcd", "a"], encoding_format="float"
                )
                got = np.array([item.embedding for item in reply.data], np.float32)
                want = [vector_of(MODEL, text) for text in ("a", "bcd", "a")]
                assert np.array_equal(got, want)
                assert reply.usage.prompt_tokens == 3
    # The first call of a key proves it, with an input that it wanted anyway.
    assert _keys(upstream) == [ANNE, ANNE, BERT, BERT]
    assert [call.inputs for call in upstream.calls] == [["a"], ["bcd"]] * 2
    names = await _namespaces(proxy)
    assert len(names) == 2
    assert all(name.startswith("key-") and len(name) == 36 for name in names)
    first = await _ask(proxy, ANNE)
    assert (first.headers["x-cache"], first.headers["x-tokens-billed"]) == ("hit", "0")


async def test_the_first_request_is_counted_once(start, upstream):
    """What proves a key counts as what it is: a miss that was billed, among the others."""
    proxy = await start()
    reply = await _ask(proxy, ANNE, ["ab cd", "a", "a", "bc"])
    told = {name: reply.headers[f"x-{name}"] for name in ("cache", "cache-misses", "tokens-billed")}
    assert told == {"cache": "miss", "cache-misses": "3", "tokens-billed": "4"}
    ((_, usage),) = await proxy.service.ledger([])
    assert (usage.misses, usage.duplicates, usage.hits) == (3, 1, 0)
    assert usage.tokens_billed == sum(map(tokens_of, upstream.inputs))


async def test_a_shared_entry_is_bought_once_and_each_key_proved_once(start, upstream):
    """With share, a second key is asked for upstream once, and then has what the first bought."""
    proxy = await start(share=True)
    texts = ["a long text", "b", "another"]
    await _ask(proxy, ANNE, texts)
    upstream.calls.clear()
    reply = await _ask(proxy, BERT, texts)
    assert (reply.headers["x-cache"], reply.headers["x-cache-hits"]) == ("partial", "2")
    assert [call.inputs for call in upstream.calls] == [["b"]]
    assert _keys(upstream) == [BERT]
    for _ in range(3):
        assert (await _ask(proxy, BERT, texts)).headers["x-cache"] == "hit"
    assert len(upstream.calls) == 1
    assert await _namespaces(proxy) == {""}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("code", [401, 403])
async def test_a_refused_key_is_served_nothing(code, share, start, upstream):
    """It gets the upstream's 401 or 403 whatever is cached, is asked for once, and harms nobody."""
    proxy = await start(share=share)
    await _ask(proxy, ANNE)
    upstream.calls.clear()
    upstream.always = _refusing(upstream, BERT, code=code)
    for headers in ({}, {"Cache-Control": "no-cache"}, {"Cache-Control": "only-if-cached"}, {}):
        reply = await _ask(proxy, BERT, **headers)
        error = (await reply.json())["error"]
        assert (reply.status, error["code"]) == (code, "invalid_api_key")
        assert reply.headers["x-should-retry"] == "false"
        assert BERT not in str(error)
    assert _keys(upstream) == [BERT]
    known = proxy.service.upstreams.snapshot()["openai"]
    assert (known["state"], known["failures_in_a_row"]) == ("closed", 0)
    assert known["failures"] == {"client_key_refused": 1}
    assert (await _ask(proxy, ANNE, "new")).status == 200
    assert BERT not in str(await _namespaces(proxy))


async def test_many_refused_keys_open_no_breaker(start, upstream):
    """However many clients come with bad keys, one with a good key is served."""
    proxy = await start()
    bad = [f"sk-bad-{i:010}" for i in range(30)]
    upstream.always = _refusing(upstream, *bad)
    replies = await asyncio.gather(*(_ask(proxy, key) for key in bad))
    assert {reply.status for reply in replies} == {401}
    assert (await _ask(proxy, ANNE)).status == 200


async def test_without_a_key_it_is_said_what_to_send(start, upstream):
    """Nobody is asked, and nothing served, for a client that sends no key: OpenAI's 401."""
    proxy = await start(share=True)
    await _ask(proxy, ANNE)
    for headers in ({}, {"Authorization": "Basic abc"}, {"Authorization": "Bearer "}):
        reply = await proxy.post({"model": MODEL, "input": "a"}, **headers)
        error = (await reply.json())["error"]
        assert reply.status == 401
        assert set(error) == {"message", "type", "param", "code"}
        assert "Authorization: Bearer KEY" in error["message"]
        assert "x-proxy-key" not in error["message"]
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("key", ["sk-ä-0123456789", "sk-with a blank", "k" * 4097])
async def test_what_is_no_key_is_refused_here(key, start, upstream):
    """What cannot stand in a header, or is longer than any key, goes to nobody."""
    proxy = await start()
    with pytest.raises(ClientKeyRefused):
        await proxy.service.embed("a", MODEL, api_key=key)
    assert not upstream.calls


async def test_beside_keys_of_the_proxy(start, upstream):
    """The proxy's key comes as x-proxy-key and stays here; the client's goes on."""
    proxy = await start(server={"keys": [{"key": "ours", "namespace": "team"}]})
    reply = await _ask(proxy, ANNE)
    assert reply.status == 401
    reply = await _ask(proxy, "ours")
    assert reply.status == 401
    assert "x-proxy-key" in (await reply.json())["error"]["message"]
    for _ in range(2):
        reply = await _ask(proxy, ANNE, **{"x-proxy-key": "ours"})
        assert reply.status == 200
    assert _keys(upstream) == [ANNE]
    (name,) = await _namespaces(proxy)
    assert name.startswith("team/key-")


async def test_azures_clients_send_theirs_as_api_key(start, upstream):
    """At Azure's path a key comes as api-key, and goes on in the form of the provider."""
    proxy = await start()
    url = proxy.url.removesuffix("/v1")
    async with openai.AsyncAzureOpenAI(
        azure_endpoint=url, api_key=ANNE, api_version="2024-10-21", max_retries=0
    ) as client:
        await client.embeddings.create(model=MODEL, input="a")
    assert _keys(upstream) == [ANNE]
    assert "api-key" not in upstream.calls[0].headers
    assert (await _ask(proxy, ANNE)).headers["x-cache"] == "hit"


async def test_an_azure_upstream_gets_it_as_api_key(start_proxy, upstream):
    """A client's Authorization becomes the header that the kind of provider knows."""
    theirs = {"kind": "azure", **_theirs(upstream)}
    models = {MODEL: {"routes": [{"provider": "mine", "model": "d"}]}}
    proxy = await start_proxy(providers={"mine": theirs}, models=models)
    assert (await _ask(proxy, ANNE)).status == 200
    (call,) = upstream.calls
    assert call.headers["api-key"] == ANNE
    assert "Authorization" not in call.headers


async def test_a_key_is_written_nowhere(start, upstream, tmp_path, caplog):
    """Not in the cache's folder, the log, metrics, /status, or an error, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)
    secret = "sk-canary-Zm9vYmFyYmF6"
    proxy = await start(server={"batch_window_ms": 1})
    await _ask(proxy, secret, "a")
    told = []
    for code in (400, 401, 403, 404, 429, 500):
        upstream.always = _refusing(upstream, secret, code=code)
        told.append(await (await _ask(proxy, secret, f"text {code}")).text())
        _at(proxy).proofs._refused.clear()
    upstream.always = _refusing(upstream, secret, code=500)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        await proxy.service.embed("x", MODEL, api_key=secret)
    told.append(f"{caught.value!r} {caught.value}")
    for page in ("metrics", "status", "v1/models"):
        async with proxy.http.get(f"{proxy.url.removesuffix('v1')}{page}") as response:
            told.append(await response.text())
    assert "key-" in told[-3]
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("embedding_proxy")]
    assert ours
    for part in (secret, secret[:10], secret[-8:], f"{secret[:7]}***"):
        assert part not in str(told)
        assert part not in str(ours)
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert any(file.name == client_secret.HASH_KEY_FILE for file in files)
    for file in files:
        assert secret not in str(file)
        assert secret.encode() not in file.read_bytes()
    assert secret not in repr(Credential(secret, "key-1"))
    assert secret not in repr(Context(credential=Credential(secret, "key-1")))


def test_a_digest_needs_the_secret(tmp_path):
    """Another installation names the same key otherwise; so a name proves nothing of a key."""
    names = set()
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        keys = client_keys.ClientKeys(Settings(), tmp_path / folder)
        names.add(keys._digest("https://a", ANNE))
        names.add(keys._digest("https://b", ANNE))
    assert len(names) == 4
    hows = [
        ClientKeyPolicy(MODEL, "s", ("p",), origin, share_cache=False, has_other_routes=False)
        for origin in "ab"
    ]
    assert len({keys._credential(how, ANNE) for how in hows}) == 2


def test_the_secret_is_made_once(tmp_path, caplog):
    """Who comes second takes the first one's; it is for the owner's eyes; a damaged one is said."""
    secret = client_secret.load_secret(tmp_path)
    file = tmp_path / client_secret.HASH_KEY_FILE
    assert len(secret) == client_secret.HASH_KEY_SIZE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    client_secret._make_secret(file)
    assert client_secret.load_secret(tmp_path) == secret
    assert [one.name for one in tmp_path.iterdir()] == [client_secret.HASH_KEY_FILE]
    file.write_bytes(b"short")
    with pytest.raises(client_secret.StoreError, match="is damaged: bring it back"):
        client_secret.load_secret(tmp_path)
    assert not caplog.records
    assert len(client_secret.load_secret(tmp_path / "missing")) == client_secret.HASH_KEY_SIZE
    assert "cannot be kept" in caplog.text


async def test_a_restart_and_another_worker_know_the_key(start, start_proxy, upstream):
    """The secret and the proofs are on disk: nothing is bought and nobody asked once more."""
    proxy = await start()
    await _ask(proxy, ANNE)
    await start_proxy.stop()
    for proxy in (await start(), await start()):
        assert (await _ask(proxy, ANNE)).headers["x-cache"] == "hit"
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("share", [False, True])
async def test_an_outage_leaves_proved_keys_their_hits(share, start, start_proxy, upstream):
    """While the upstream is down, a known key is served, and a new one told to come again."""
    proxy = await start(share=share)
    await _ask(proxy, ANNE)
    await start_proxy.stop()
    await upstream.stop()
    proxy = await start(share=share)
    assert (await _ask(proxy, ANNE)).headers["x-cache"] == "hit"
    reply = await _ask(proxy, BERT)
    assert (reply.status, (await reply.json())["error"]["code"]) == (503, "upstream_unavailable")
    assert int(reply.headers["Retry-After"]) >= 1
    await upstream.start()


async def test_a_proof_grows_old(start, upstream, monkeypatch):
    """After an hour a key is proved anew; one that was revoked is served nothing from then on."""
    proxy = await start()
    known = _at(proxy).proofs
    now = time.time()
    monkeypatch.setattr(known, "_clock", lambda: now)
    await _ask(proxy, ANNE)
    assert (await _ask(proxy, ANNE)).headers["x-cache"] == "hit"
    now += proofs.FRESH_S - 1
    assert (await _ask(proxy, ANNE)).headers["x-cache"] == "hit"
    assert len(upstream.calls) == 1
    now += 2
    reply = await _ask(proxy, ANNE)
    assert (reply.headers["x-cache"], len(upstream.calls)) == ("miss", 2)
    assert (await _ask(proxy, ANNE)).headers["x-cache"] == "hit"
    now += proofs.FRESH_S + 1
    upstream.always = _refusing(upstream, ANNE)
    assert (await _ask(proxy, ANNE)).status == 401
    now += proofs.REFUSED_S + 1
    assert (await _ask(proxy, ANNE)).status == 401
    assert len(upstream.calls) == 4


async def test_an_old_proof_will_do_in_an_outage(start, upstream, monkeypatch):
    """A key that is due is served while nobody can be asked, for a day; one try a minute."""
    proxy = await start()
    known = _at(proxy).proofs
    now = time.time()
    monkeypatch.setattr(known, "_clock", lambda: now)
    await _ask(proxy, ANNE)
    now += proofs.FRESH_S + 1
    upstream.always = status(500)
    upstream.calls.clear()
    assert (await _ask(proxy, ANNE)).headers["x-cache"] == "hit"
    tried = len(upstream.calls)
    assert tried
    for _ in range(3):
        assert (await _ask(proxy, ANNE)).headers["x-cache"] == "hit"
    assert len(upstream.calls) == tried
    now += proofs.STALE_S
    assert (await _ask(proxy, ANNE)).status == 503


@pytest.mark.parametrize("texts", ["a", [f"text {i}" for i in range(200)]])
async def test_a_key_that_is_revoked_meanwhile(texts, start, upstream):
    """Its first miss is refused, and from then on its hits are, in the same bytes too."""
    proxy = await start()
    await _ask(proxy, ANNE, texts)
    assert [(await _ask(proxy, ANNE, texts)).status for _ in range(3)] == [200] * 3
    upstream.always = _refusing(upstream, ANNE)
    assert (await _ask(proxy, ANNE, "new")).status == 401
    assert (await _ask(proxy, ANNE, texts)).status == 401


async def test_only_if_cached_proves_nothing(start, upstream):
    """A request that may buy nothing is not served to an unknown key, and is to a known one."""
    proxy = await start(share=True)
    await _ask(proxy, ANNE)
    only = {"Cache-Control": "only-if-cached"}
    reply = await _ask(proxy, BERT, **only)
    assert (reply.status, (await reply.json())["error"]["code"]) == (504, "not_cached")
    assert (await _ask(proxy, ANNE, **only)).headers["x-cache"] == "hit"
    assert len(upstream.calls) == 1


async def test_no_store_leaves_no_entry(start, upstream):
    """What proves the key of a request that leaves no trace is not kept either."""
    proxy = await start()
    for calls in (2, 4):
        await _ask(proxy, ANNE, ["a", "bc"], **{"Cache-Control": "no-store"})
        if calls == 2:
            assert len(upstream.calls) == 2
    # The key is known by now: all is bought in one call.
    assert [call.inputs for call in upstream.calls] == [["a"], ["bc"], ["a", "bc"]]


@pytest.mark.parametrize("share", [False, True])
async def test_a_key_is_proved_once_for_all_who_come_with_it(share, start, upstream):
    """Of many requests with one new key, one proves it; the others wait, and buy what they lack."""
    proxy = await start(share=share)
    upstream.gate = asyncio.Event()
    asked = [asyncio.create_task(_ask(proxy, ANNE, f"text {i % 4}")) for i in range(20)]
    await _called(upstream, 1)
    await _a_while()
    assert len(upstream.calls) == 1
    upstream.gate.set()
    assert {reply.status for reply in await asyncio.gather(*asked)} == {200}
    assert sorted(upstream.inputs) == [f"text {i}" for i in range(4)]


async def test_a_bad_key_is_asked_for_once_for_all_who_come_with_it(start, upstream):
    """Of many requests with one bad key, one is refused upstream, the others here."""
    proxy = await start()
    upstream.always = _refusing(upstream, ANNE)
    replies = await asyncio.gather(*(_ask(proxy, ANNE, f"text {i}") for i in range(20)))
    assert {reply.status for reply in replies} == {401}
    assert len(upstream.calls) == 1


async def test_whoever_proves_and_leaves_harms_nobody(start, upstream):
    """When the one who proves a key is gone, the next in line does."""
    proxy = await start()
    upstream.script.append(hang())
    embed = proxy.service.embed
    first = asyncio.create_task(embed("a", MODEL, api_key=ANNE))
    await _called(upstream, 1)
    second = asyncio.create_task(embed("b", MODEL, api_key=ANNE))
    await _a_while()
    first.cancel()
    assert (await second).usage.misses == 1
    assert upstream.inputs == ["a", "b"]


async def test_a_proof_does_not_join_anothers_purchase(start, upstream):
    """With share, what another key is buying just now proves nothing of this one."""
    proxy = await start(share=True)
    await _ask(proxy, ANNE, "warm")
    upstream.calls.clear()
    upstream.gate = asyncio.Event()
    upstream.always = _refusing(upstream, BERT)
    good = asyncio.create_task(_ask(proxy, ANNE))
    await _called(upstream, 1)
    bad = asyncio.create_task(_ask(proxy, BERT))
    await _called(upstream, 2)
    upstream.gate.set()
    assert ((await good).status, (await bad).status) == (200, 401)


@pytest.mark.parametrize("code", [401, 429, 500])
async def test_whoever_joined_another_key_tries_its_own(code, start, upstream):
    """With share, a purchase that fails for its leader's key is made with the joiner's."""
    proxy = await start(share=True)
    for key in (ANNE, BERT):
        await _ask(proxy, key, "warm")
    upstream.calls.clear()
    upstream.gate = asyncio.Event()
    upstream.always = _refusing(upstream, ANNE, code=code)
    leader = asyncio.create_task(_ask(proxy, ANNE))
    await _called(upstream, 1)
    joiner = asyncio.create_task(_ask(proxy, BERT))
    await _a_while()
    assert len(upstream.calls) == 1
    upstream.gate.set()
    assert (await leader).status in (code, 502)
    reply = await joiner
    assert (reply.status, reply.headers["x-cache-misses"]) == (200, "1")


async def test_a_rate_limit_is_that_of_its_key(start, upstream):
    """One key's 429 lets no other wait, and its own rest is told it without a further call."""
    proxy = await start()
    for key in (ANNE, BERT):
        await _ask(proxy, key)

    async def limited(request, payload):
        refusing = _refusing(upstream, ANNE, code=429, message="slow down")
        response = await refusing(request, payload)
        if response.status == 429:
            response.headers["Retry-After"] = "300"
        return response

    upstream.always = limited
    reply = await _ask(proxy, ANNE, "b")
    assert (reply.status, reply.headers["Retry-After"]) == (429, "300")
    upstream.calls.clear()
    assert (await _ask(proxy, ANNE, "c")).status == 429
    assert not upstream.calls
    assert (await _ask(proxy, BERT, "c")).status == 200
    (lane,) = proxy.service.upstreams.snapshot()["openai"]["rests"]
    assert lane.startswith(f"{MODEL} (key-")


@pytest.mark.parametrize(("code", "kind"), [(429, "insufficient_quota"), (402, "x")])
async def test_the_end_of_a_credit_is_that_of_its_key(code, kind, start, upstream):
    """One key without credit rests nothing: others go on, and it is told so each time."""
    proxy = await start()
    for key in (ANNE, BERT):
        await _ask(proxy, key)
    error = {"message": "no credit", "type": kind, "code": kind}

    async def act(request, payload):
        if request.headers["Authorization"] == f"Bearer {ANNE}":
            return await status(code, {"error": error})(request, payload)
        return await _refusing(upstream)(request, payload)

    upstream.always = act
    for text in ("b", "c"):
        reply = await _ask(proxy, ANNE, text)
        assert (reply.status, (await reply.json())["error"]["code"]) == (code, kind)
        assert (await _ask(proxy, BERT, text)).status == 200


async def test_a_learned_limit_is_that_of_its_key(start, upstream):
    """What the headers of one key's reply say is left holds up no other key."""
    proxy = await start()
    used_up = {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "600s",
    }

    async def act(request, payload):
        response = await _refusing(upstream)(request, payload)
        response.headers.update(used_up)
        return response

    upstream.script.append(act)
    await _ask(proxy, ANNE)
    assert (await _ask(proxy, BERT)).status == 200
    assert (await _ask(proxy, ANNE, "b")).status == 429
    assert _keys(upstream) == [ANNE, BERT]


async def test_slots_are_those_of_a_key(start_proxy, upstream):
    """One key's calls that hang take no place from another key."""
    theirs = _theirs(upstream, limits={"concurrency": 1})
    proxy = await start_proxy(providers={"openai": theirs})
    for key in (ANNE, BERT):
        await _ask(proxy, key)
    upstream.holding = {"hangs": hang()}
    hanging = [asyncio.create_task(_ask(proxy, ANNE, "hangs")) for _ in range(3)]
    await _called(upstream, 3)
    async with asyncio.timeout(60):
        assert (await _ask(proxy, BERT, "b")).status == 200
    for one in hanging:
        one.cancel()


async def test_gathered_requests_are_of_one_key(start_proxy, upstream):
    """Small requests of two keys at a time become two calls, each with its own key and inputs."""
    # A call of three inputs is full, so nothing depends on how long the gathering takes.
    providers = {"openai": _theirs(upstream, limits={"inputs": 3})}
    proxy = await start_proxy(providers=providers, server={"batch_window_ms": 1000})
    for key in (ANNE, BERT):
        await _ask(proxy, key, ["w", "ar", "m"])
    upstream.calls.clear()
    asked = [(key, f"{key} {i}") for i in range(3) for key in (ANNE, BERT)]
    replies = await asyncio.gather(*(_ask(proxy, key, text) for key, text in asked))
    assert {reply.status for reply in replies} == {200}
    assert sorted(_keys(upstream)) == [ANNE, BERT]
    for call, key in zip(upstream.calls, _keys(upstream), strict=True):
        assert sorted(call.inputs) == [f"{key} {i}" for i in range(3)]


async def test_an_outage_is_everyones(start, upstream):
    """Failures that are the provider's own open its breaker, whoever's key meets them."""
    proxy = await start()
    for key in (ANNE, BERT):
        await _ask(proxy, key)
    upstream.always = status(500)
    for i in range(5):
        await _ask(proxy, ANNE, f"text {i}")
    upstream.calls.clear()
    reply = await _ask(proxy, BERT, "b")
    assert (reply.status, upstream.calls) == (503, [])
    assert (await _ask(proxy, BERT)).headers["x-cache"] == "hit"


async def test_one_keys_retries_are_not_anothers(start, upstream):
    """A key whose calls fail uses up its own budget of second tries, and no other key's."""
    proxy = await start()
    anne, bert = Credential(ANNE, "key-a"), Credential(BERT, "key-b")
    upstreams = proxy.service.upstreams
    while upstreams.budget_of(anne).can_retry:
        upstreams.budget_of(anne).take()
    assert upstreams.budget_of(bert).can_retry
    assert upstreams.budget.can_retry


async def test_no_other_origin_sees_the_key(start, upstream, second, monkeypatch):
    """Failover goes on with the other provider's own key, also into the client's namespace."""
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-operator-0123456789")
    proxy = await start(more={"openrouter": {"base_url": second.url}})
    await _ask(proxy, ANNE)
    upstream.always = status(503)
    reply = await _ask(proxy, ANNE, "b")
    assert (reply.status, reply.headers["x-embedding-provider"]) == (200, "openrouter")
    assert _keys(second) == ["sk-operator-0123456789"]
    assert ANNE not in str([call.headers for call in second.calls])
    assert (await _ask(proxy, ANNE, "b")).headers["x-cache"] == "hit"
    assert (await _ask(proxy, "", "b")).headers["x-cache"] == "miss"


async def test_without_a_key_the_other_routes_answer(start, upstream, second, monkeypatch):
    """Who sends none is served by the proxy's own key, from the common part; nobody else's."""
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-operator-0123456789")
    proxy = await start(more={"openrouter": {"base_url": second.url}})
    await _ask(proxy, ANNE)
    for verdict in ("miss", "hit"):
        reply = await _ask(proxy, "")
        assert (reply.status, reply.headers["x-cache"]) == (200, verdict)
    assert _keys(second) == ["sk-operator-0123456789"]
    assert _keys(upstream) == [ANNE]
    upstream.always = _refusing(upstream, BERT)
    assert (await _ask(proxy, BERT)).status == 401
    assert len(second.calls) == 1


async def test_a_key_that_cannot_be_proved_is_as_none(start, upstream, second, monkeypatch):
    """Where other routes are, who cannot be proved has what one without a key has."""
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-operator-0123456789")
    proxy = await start(more={"openrouter": {"base_url": second.url}})
    await upstream.stop()
    reply = await _ask(proxy, ANNE)
    assert (reply.status, reply.headers["x-embedding-provider"]) == (200, "openrouter")
    assert (await _ask(proxy, "")).headers["x-cache"] == "hit"
    only = {"Cache-Control": "only-if-cached"}
    assert (await _ask(proxy, BERT, **only)).headers["x-cache"] == "hit"
    assert await _namespaces(proxy) == {""}
    await upstream.start()


async def test_it_is_tried_again_whatever_is_at_hand(start, upstream, second, monkeypatch):
    """A key that could not be proved is proved when it can be, though its reply came again."""
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-operator-0123456789")
    proxy = await start(more={"openrouter": {"base_url": second.url}})
    await upstream.stop()
    assert [(await _ask(proxy, ANNE)).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
    await upstream.start()
    assert (await _ask(proxy, ANNE)).headers["x-embedding-provider"] == "openai"
    assert _keys(upstream) == [ANNE]


async def test_points_lie_in_the_part_of_the_key(start, upstream):
    """What is indexed is of the key that asked, and asked again it is the same point."""
    async with QdrantServer() as qdrant:
        proxy = await start(index={"qdrant": {"url": qdrant.url}})
        for key in (ANNE, ANNE, BERT, BERT):
            assert (await _ask(proxy, key, ["a", "bc"])).status == 200
        async with asyncio.timeout(60):
            while (await proxy.service.indexing.indexer.snapshot())["backlog_points"]:  # noqa: ASYNC110 - behind a socket
                await asyncio.sleep(0.01)
        points = await qdrant.points(f"{MODEL}-1536")
    payloads = [point["payload"] for point in points.values()]
    assert sorted(one["text"] for one in payloads) == ["a", "a", "bc", "bc"]
    assert {one["namespace"] for one in payloads} == await _namespaces(proxy)


async def test_a_refused_key_has_no_stand_in(start, upstream):
    """A model that stands in for another does not do so for a key that is refused."""
    models = {MODEL: {"fallback": [{"model": "wordllama-embed", "dimension_policy": "pad"}]}}
    proxy = await start(models=models)
    upstream.always = _refusing(upstream, ANNE)
    assert (await _ask(proxy, ANNE)).status == 401
    assert (await _ask(proxy, "")).status == 401


async def test_a_model_known_by_name_alone(start, upstream):
    """Its width is learned with the key that asks first; others prove theirs; it is not listed."""
    upstream.widths = {"private": 24}
    proxy = await start(share=True)
    for key, inputs in ((ANNE, ["a", "bc"]), (BERT, ["bc", "a"])):
        reply = await proxy.post({"model": "private", "input": inputs}, **_bearer(key))
        assert reply.status == 200
        assert [len(item["embedding"]) for item in (await reply.json())["data"]] == [24, 24]
    assert [call.inputs for call in upstream.calls] == [["a"], ["bc"], ["a"]]
    async with proxy.http.get(f"{proxy.url}/models", headers=_bearer(BERT)) as response:
        names = {model["id"] for model in (await response.json())["data"]}
    assert MODEL in names
    assert "private" not in names


async def test_what_is_kept_by_key_is_bounded(start, upstream, monkeypatch):
    """Keys without end leave limits, rests, budgets and proofs of the newest alone."""
    monkeypatch.setattr(proofs, "MAX_KEYS", 20)
    monkeypatch.setattr(health, "MAX_KEYS", 20)
    proxy = await start()
    for one in (proxy.service.upstreams._budgets, _provider(proxy)._client_queues):
        monkeypatch.setattr(one, "max_size", 20)
    upstream.always = status(429, headers={"Retry-After": "300"})
    for i in range(50):
        await _ask(proxy, f"sk-limited-{i:010}")
    upstream.always = status(401)
    for i in range(50):
        await _ask(proxy, f"sk-refused-{i:010}")
    upstream.always = None
    for i in range(50):
        await _ask(proxy, f"sk-good-{i:010}")
    keys, known = _at(proxy), proxy.service.upstreams.of("openai")
    assert len(keys.proofs._proved) == len(keys.proofs._refused) == 20
    assert not keys._locks
    assert len(known.cooldowns) <= 20
    assert len(known.cooldowns._limits) <= 20
    assert len(proxy.service.upstreams._budgets) == len(_provider(proxy)._client_queues) == 20


def _provider(proxy):
    return proxy.service.models[MODEL].router.routes[0].provider


async def test_the_ledger_tells_keys_apart_by_name(start):
    """Shared or not, the bill names each key by its digest, and stats and purge take that name."""
    proxy = await start(share=True)
    for key in (ANNE, BERT):
        await _ask(proxy, key)
    clients = {name for (name,), _ in await proxy.service.ledger(["client"])}
    assert len(clients) == 2
    assert all(name.startswith("key-") for name in clients)


async def test_a_namespace_can_be_purged(start, start_proxy, tmp_path, run_cli):
    """`cache stats` and `purge --namespace` know the part of one key, and leave the others."""
    proxy = await start()
    for key in (ANNE, BERT):
        await _ask(proxy, key)
    name = min(await _namespaces(proxy))
    await start_proxy.stop()
    assert name in await run_cli("cache", "stats", "--by", "namespace")
    await run_cli("cache", "export", tmp_path / "out", "--namespace", name)
    await run_cli("cache", "purge", "--namespace", name, "--yes")
    with closing(sqlite3.connect(next((tmp_path / "cache").rglob("*.db")))) as database:
        assert database.execute("SELECT count(*) FROM Cache").fetchone() == (1,)


@pytest.mark.parametrize("share", [False, True])
async def test_frozen_a_key_has_its_part(share, start, start_proxy, upstream):
    """Where nothing is bought nobody can be asked: a key has its own part, or the common one."""
    proxy = await start(share=share)
    await _ask(proxy, ANNE)
    await start_proxy.stop()
    proxy = await start(share=share, cache={"mode": "frozen"})
    assert (await _ask(proxy, ANNE)).headers["x-cache"] == "hit"
    assert (await _ask(proxy, BERT)).status == (200 if share else 404)
    assert (await _ask(proxy, "")).status == 401
    assert len(upstream.calls) == 1


async def test_canaries_use_nobodys_key(start, upstream, second, monkeypatch, caplog):
    """No canary is bought with a client's key; the routes that need none are watched as ever."""
    caplog.set_level(logging.INFO, "embedding_proxy.drift_check")
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-operator-0123456789")
    proxy = await start(more={"openrouter": {"base_url": second.url}})
    await _ask(proxy, ANNE)
    assert [one["provider"] for one in await proxy.service.drift_check.check()] == ["openrouter"]
    assert len(upstream.calls) == 1
    assert not [line for line in caplog.records if line.name == "embedding_proxy.drift_check"]


async def test_a_refused_key_as_a_probe_leaves_its_place(start, upstream):
    """When one call is to tell whether a provider is well again, a bad key's call tells nothing."""
    proxy = await start()
    for key in (ANNE, BERT):
        await _ask(proxy, key)
    upstream.always = status(500)
    for i in range(5):
        await _ask(proxy, ANNE, f"text {i}")
    breaker = proxy.service.upstreams.of("openai").breaker_of(MODEL)
    assert not breaker.is_ready
    breaker._until = 0.0
    upstream.always = _refusing(upstream, ANNE)
    assert (await _ask(proxy, ANNE, "b")).status == 401
    assert (await _ask(proxy, BERT, "b")).status == 200


async def test_a_provider_asked_without_a_key_asks_nobody(start, upstream):
    """Whoever reaches past the service, as a probe does, gets an error, and no call is made."""
    proxy = await start()
    for ask in (
        provider_factory.make_scheduler(
            proxy.service.models[MODEL].router, proxy.service.settings
        ).embed,
        partial(call_route, proxy.service.models[MODEL].router.routes[0]),
    ):
        with pytest.raises(ClientKeyRefused):
            await ask(Space("openai/x", 1536), ["a"], Context())
    assert not upstream.calls


async def test_without_http(upstream, tmp_path):
    """In Python the key is a parameter."""
    sections = {
        "providers": {"openai": _theirs(upstream)},
        "cache": {"directory": str(tmp_path / "cache")},
    }
    service = EmbeddingService(Settings.model_validate(sections), sleep=no_wait)
    async with service:
        for misses in (1, 0):
            result = await service.embed("a", MODEL, api_key=ANNE)
            assert result.usage.misses == misses
            assert result.namespace.startswith("key-")


def test_a_proof_by_the_clock(tmp_path):
    """Fresh for an hour, good for a day, deferred for a minute; files of the past are deleted."""
    now = 1_800_000_000.0
    known = Proofs(tmp_path / "p", lambda: now)
    assert known.status("a") is KeyStatus.UNKNOWN
    known.accept("a")
    start = now
    for age, want in (
        (0, KeyStatus.PROVED),
        (proofs.FRESH_S - 1, KeyStatus.PROVED),
        (proofs.FRESH_S, KeyStatus.DUE),
        (proofs.STALE_S - 1, KeyStatus.DUE),
        (proofs.STALE_S, KeyStatus.UNKNOWN),
        (-1, KeyStatus.UNKNOWN),
    ):
        now = start + age
        assert known.status("a") is want
        assert Proofs(tmp_path / "p", lambda: start).status("a") is KeyStatus.PROVED
        assert known.status("b") is KeyStatus.UNKNOWN
    now = start + proofs.FRESH_S
    known.defer("a")
    assert known.status("a") is KeyStatus.PROVED
    now += proofs.AGAIN_S
    assert known.status("a") is KeyStatus.DUE
    known.accept("a")
    assert known.status("a") is KeyStatus.PROVED
    now += proofs.STALE_S + 1
    Proofs(tmp_path / "p", lambda: now)
    assert not list((tmp_path / "p").iterdir())


def test_the_files_of_proofs_are_bounded(tmp_path, monkeypatch):
    """Of keys without end the newest have a file; the others are proved again."""
    monkeypatch.setattr(proofs, "MAX_KEYS", 5)
    monkeypatch.setattr(proofs, "SWEEP_EVERY", 10)
    now = 1_800_000_000.0
    known = Proofs(tmp_path / "p", lambda: now)
    for number in range(20):
        now += 1
        known.accept(f"{number:02}")
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == [
        f"{number:02}" for number in range(15, 20)
    ]


def test_a_refusal_by_the_clock(tmp_path):
    """A refused key is refused for a minute, and unknown then, to every worker."""
    now = 1_800_000_000.0
    known = Proofs(tmp_path / "p", lambda: now)
    known.accept("a")
    known.refuse("a", ClientKeyRefused("no", status=403, code="c"))
    for _ in range(2):
        with pytest.raises(ClientKeyRefused, match="no") as caught:
            known.status("a")
        assert (caught.value.status, caught.value.code) == (403, "c")
        now += proofs.REFUSED_S - 1 if now < 1_800_000_001 else 0
    assert Proofs(tmp_path / "p", lambda: now).status("a") is KeyStatus.UNKNOWN
    now += 1
    assert known.status("a") is KeyStatus.UNKNOWN


def test_proofs_without_a_disk(tmp_path):
    """What cannot be written is known to this process."""
    (tmp_path / "file").touch()
    known = Proofs(tmp_path / "file" / "p")
    known.accept("a")
    assert known.status("a") is KeyStatus.PROVED
    known.refuse("a", ClientKeyRefused("no"))


@pytest.mark.parametrize(
    ("body", "want"),
    [
        (b'{"m":"key sk-anne-0123456789."}', b'{"m":"key ***."}'),
        (b'"sk-anne-012..."', b'"***"'),
        (b'"is sk-an***6789, and *** too"', b'"is *** and *** too"'),
        (b'"sk...89 and so on... yes"', b'"*** and so on... yes"'),
        (b'"sk-bert stays, sk-a too"', b'"sk-bert stays, sk-a too"'),
    ],
)
def test_a_key_is_taken_out_of_what_an_upstream_says(body, want):
    """Whole, cut short, or masked as vendors do; what is no part of it stays."""
    assert Credential(ANNE, "key-1").redacted(body) == want


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"openai": {"auth": "client", "api_key_env": "X"}}, "exclude each other"),
        ({"openai": {"key": "sk-secret"}}, "does not belong in the file"),
        ({"openai": {"share_cache": True}}, "is for auth: client"),
        ({"local": {"auth": "client"}}, "has no auth"),
        ({"openai": {"auth": "client"}, "openrouter": {"auth": "client"}}, "two origins"),
    ],
)
def test_what_does_not_go_together_is_refused(sections, says):
    """A mistake is told in one line that repeats no key."""
    with pytest.raises(ValueError, match=says) as caught:
        Settings.model_validate({"providers": sections})
    assert "sk-secret" not in caught.value.errors(include_input=False)[0]["msg"]


def test_callers_keys_go_to_one_origin():
    """Two origins that would be sent a client's key are refused; two paths of one are not."""
    one, other = "https://a.example/v1", "https://A.example:443/v2"
    for url, fits in ((other, True), ("https://b.example/v1", False)):
        sections = {
            "providers": {
                "openai": {"auth": "client", "base_url": one},
                "mine": {"kind": "openai_compatible", "base_url": url},
            },
            "passthrough": "mine",
            "passthrough_auth": "client",
        }
        if fits:
            Settings.model_validate(sections)
            continue
        with pytest.raises(ValueError, match="two origins"):
            Settings.model_validate(sections)


def test_a_kind_that_sends_no_key_takes_none(monkeypatch):
    """A kind that a package brings, and that is no HTTP of ours, cannot be asked so."""
    odd = registry.Kind(Profile(base_url="https://x.example"), object)
    monkeypatch.setitem(registry.KINDS, "odd", odd)
    with pytest.raises(ValueError, match="odd does not say so"):
        Settings.model_validate({"providers": {"odd": {"kind": "odd", "auth": "client"}}})


async def test_passed_calls_use_the_same_key(start_proxy):
    """Calls that are passed to such a provider go with the client's key, in the provider's form."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "gpt"}]})

    async with AnyServer(answer) as other:
        proxy = await start_proxy(
            providers={"openai": {"base_url": other.url, "auth": "client"}},
            server={"keys": ["ours"]},
            passthrough="openai",
        )
        ours = {"x-proxy-key": "ours"}
        for headers in (_bearer(ANNE), {"api-key": ANNE}):
            async with proxy.http.post(f"{proxy.url}/chat", headers={**headers, **ours}) as reply:
                assert reply.status == 200
        async with proxy.http.post(f"{proxy.url}/chat", headers=_bearer("ours")) as reply:
            assert reply.status == 401
            assert "x-proxy-key" in await reply.text()
        url, headers = f"{proxy.url}/models", {**_bearer(BERT), **ours}
        async with proxy.http.get(url, headers=headers) as reply:
            assert "gpt" in {model["id"] for model in (await reply.json())["data"]}
        sent = [call.headers for call in other.seen]
    assert [one["Authorization"] for one in sent] == [f"Bearer {k}" for k in (ANNE, ANNE, BERT)]
    assert not any("api-key" in one or "x-proxy-key" in one for one in sent)


async def test_commands_leave_it_out_and_say_so(run_cli, start, upstream):
    """`check` skips it and is content, `compare` and `migrate` say why there is nothing to ask."""
    service = (await start()).service
    target = Target(service, find_model(service.settings, MODEL, "--to"), 1536)
    assert "each client's own key" in target.unusable_reason
    providers = {"openai": _theirs(upstream), "local": None}
    models = {MODEL: {"routes": [{"provider": "openai", "model": MODEL}]}}
    sections = {"providers": providers, "models": models}
    told = json.loads(await run_cli("check", "--json", **sections))
    assert told["providers"]["openai"]["state"] == "skipped"
    assert "each client's own key" in told["providers"]["openai"]["why"]
    assert told["ok"]
    told = await run_cli("compare", "--model", MODEL, code=1, **sections)
    assert "each client's own key" in told
    assert len(told.splitlines()) == 1
    assert not upstream.calls


async def test_what_applies_can_be_read_again(run_cli, tmp_path):
    """`config show` tells of the key and of what is shared, and its output is a configuration."""
    told = await run_cli(
        "config", "show", providers={"openai": {"auth": "client", "share_cache": True}}
    )
    file = tmp_path / "shown.yaml"
    file.write_text(told)
    entry = load(file).providers["openai"]
    assert (entry.uses_client_key, entry.share_cache, entry.key_variable) == (True, True, None)

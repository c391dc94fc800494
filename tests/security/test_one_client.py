"""What one client sends harms no other model and input: no breaker, no rest, no learned fact."""

import asyncio
import time

import aiohttp
import pytest
from clock import some_turns, until
from embedding_proxy.proxy.service import client_keys
from embedding_proxy.proxy.service import client_keys as proofs
from fault_server import hang, status

KEY = "sk-client-0123456789-{}"


def _error(message="no", code=None, kind=None, param=None, **more):
    return {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}


INNER = {"metadata": {"provider_name": "Other", "raw": '{"error": {"message": "bad key"}}'}}

BAD_MODEL = {
    "403 without a reason": status(403, b""),
    "403 model_not_found": status(
        403, _error("Project `p` does not have access", "model_not_found")
    ),
    "403 of a region": status(403, _error("This model is not available in your region.", 403)),
    "403 of Google": status(
        403,
        _error(
            "Permission 'aiplatform.endpoints.predict' denied on resource 'm'.",
            403,
            status="PERMISSION_DENIED",
            details=[{"reason": "IAM_PERMISSION_DENIED"}],
        ),
    ),
    "401 of LiteLLM about a model": status(
        401,
        _error("key not allowed to access model.", "401", "key_model_access_denied", "model"),
    ),
    "401 about the parameter model": status(401, _error("not for you", None, None, "model")),
    "401 of a provider behind OpenRouter": status(401, _error("Provider error", 401, **INNER)),
    "402 of a provider behind OpenRouter": status(402, _error("Provider error", 402, **INNER)),
    "403 of a free tier": status(403, _error("used up", "AllocationQuota.FreeTierOnly")),
    "403 of a paid balance": status(
        403, {"code": 30011, "message": "The selected model requires paid balance."}
    ),
    "400 of a budget for a model": status(
        400,
        _error(
            "LiteLLM Virtual Key: a1, key_alias: None, exceeded budget for model=m",
            "400",
            "budget_exceeded",
        ),
    ),
    "404": status(404),
    "404 of Azure": status(404, _error("no deployment", "DeploymentNotFound")),
    "400 about a model": status(400, _error("no", "invalid_model")),
    "429 with a wait": status(429, headers={"Retry-After": "300"}),
    "500": status(500),
    "503 of a provider behind OpenRouter": status(503, _error("Provider error", 503, **INNER)),
    "a page": status(200, b"<html><title>busy</title>"),
    "no vectors": status(200, {"object": "list", "data": []}),
}


def by(upstream, choose):
    """Play what `choose` gives for a payload; the right answer where it gives nothing."""

    async def act(request, payload):
        other = choose(payload)
        if other is not None:
            return await other(request, payload)
        return await status(200, upstream.reply(payload))(request, payload)

    return act


def health(proxy):
    """Return what is known of the provider."""
    return proxy.service.upstreams.of("openai")


@pytest.fixture
def models(start_proxy, upstream, monkeypatch):
    """Give a function that starts a proxy with two models, each a space of its own."""

    async def start(**sections):
        entries = {
            name: {
                "space": name,
                "dimensions": 8,
                "routes": [{"provider": "openai", "model": name}],
            }
            for name in ("good", "bad")
        }
        upstream.widths = {"good": 8, "bad": 8}
        if "providers" in sections:
            monkeypatch.setenv("OPENAI_API_KEY", "openai-secret-key")
            return await start_proxy(models=entries, **sections)
        return await start_proxy(openai=upstream, models=entries, **sections)

    return start


async def _ask(proxy, inputs, model="good", **fields):
    return await proxy.post({"model": model, "input": inputs, **fields})


@pytest.mark.parametrize("name", BAD_MODEL)
async def test_a_model_that_is_refused_or_fails_shuts_no_other(name, models, upstream):
    """However often a client asks for it, the provider is asked for other models as before."""
    proxy = await models()
    upstream.always = by(upstream, lambda one: BAD_MODEL[name] if one["model"] == "bad" else None)
    for i in range(12):
        reply = await _ask(proxy, f"text {i}", "bad")
        error = (await reply.json())["error"]
        assert reply.status >= 400
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] != "upstream_auth"
        assert (await _ask(proxy, f"text {i}")).status == 200


@pytest.mark.parametrize("code", [402, 403])
async def test_an_input_that_is_refused_shuts_nothing(code, models, upstream):
    """A 403 or a 402 of one input alone is that input's, also where no reason is given."""
    refusals = {
        402: status(402, _error("This request requires more credits, or fewer max_tokens.", 402)),
        403: status(403, b""),
    }
    proxy = await models()
    upstream.holding = {"flagged": refusals[code]}
    for i in range(6):
        assert (await _ask(proxy, "flagged")).status == code
        assert (await _ask(proxy, f"text {i}")).status == 200
    assert health(proxy).snapshot()["opened"] == 0


async def test_those_who_share_a_call_with_a_refused_input_are_served(models, upstream):
    """Requests that were gathered into one call get their own answers."""
    # The five are a full call: nothing depends on how long the gathering takes.
    provider = {"base_url": upstream.url, "limits": {"inputs": 5}}
    proxy = await models(server={"batch_window_ms": 1000}, providers={"openai": provider})
    upstream.holding = {"flagged": status(403, b"")}
    texts = ["a", "b", "flagged", "c", "d"]
    replies = await asyncio.gather(*(_ask(proxy, text) for text in texts))
    assert max(len(call.inputs) for call in upstream.calls) > 1
    assert [reply.status for reply in replies] == [200, 200, 403, 200, 200]


async def test_a_403_without_a_reason_goes_on_to_the_next_route(
    start_proxy, upstream, second, monkeypatch
):
    """Another provider may have the model; alone, the client gets a 403 that it does not repeat."""
    upstream.always = status(403, b"")
    proxy = await start_proxy(openai=upstream, openrouter=second)
    reply = await _ask(proxy, "a", "text-embedding-3-small")
    assert (reply.status, reply.headers["x-embedding-provider"]) == (200, "openrouter")
    second.always = status(403, b"")
    reply = await _ask(proxy, "b", "text-embedding-3-small")
    assert (reply.status, reply.headers["x-should-retry"]) == (403, "false")
    assert (await reply.json())["error"]["code"] == "upstream_permission_denied"


@pytest.mark.parametrize(
    "act",
    [
        status(429, headers={"Retry-After": "300"}),
        status(500),
        status(200, {"object": "list", "data": [{"index": 0, "embedding": [1.0] * 4}]}),
    ],
    ids=["429", "500", "width"],
)
async def test_a_field_that_one_client_adds_harms_those_alone_who_add_it(act, models, upstream):
    """A field may have the upstream fail, limit or answer otherwise: for requests with it."""
    proxy = await models()
    upstream.always = by(upstream, lambda one: act if "extra" in one else None)
    for i in range(12):
        assert (await _ask(proxy, f"text {i}", extra=1)).status >= 400
        assert (await _ask(proxy, f"text {i}")).status == 200


async def test_an_end_user_over_budget_harms_nobody_else(models, upstream):
    """`user` is the client's own; a budget that ends for it is not the account's."""
    over = status(
        400, _error("ExceededBudget: End User=bob over budget.", "400", "budget_exceeded")
    )
    proxy = await models()
    upstream.always = by(upstream, lambda one: over if one.get("user") == "bob" else None)
    reply = await _ask(proxy, "a", user="bob")
    assert (reply.status, reply.headers["x-should-retry"]) == (402, "false")
    assert (await _ask(proxy, "a", user="anne")).status == 200


async def test_no_field_decides_the_width_of_a_model(start_proxy, upstream):
    """The width that a client's own field has made is learned for requests with that field."""
    model = "text-embedding-9"
    narrow = {model: 4}

    async def act(request, payload):
        upstream.widths = narrow if "extra" in payload else {model: 8}
        return await status(200, upstream.reply(payload))(request, payload)

    upstream.always = act
    proxy = await start_proxy(openai=upstream)
    for text in ("a", "b"):
        reply = await _ask(proxy, [text, "c"], model, extra=1)
        assert reply.status == 200
        assert {len(one["embedding"]) for one in (await reply.json())["data"]} == {4}
    reply = await _ask(proxy, "a", model)
    assert reply.status == 200, await reply.text()
    assert len((await reply.json())["data"][0]["embedding"]) == 8


async def test_what_a_client_writes_teaches_no_limit(models, upstream):
    """An upstream that quotes an input in its refusal does not speak of its own limits."""
    text = "the batch size must be at most 1"
    refusal = status(400, _error(f"cannot embed: '{text}'"))
    proxy = await models()
    upstream.holding = {text: refusal}
    assert (await _ask(proxy, [text, "a", "b"])).status == 400
    upstream.calls.clear()
    others = [f"text {i}" for i in range(40)]
    assert (await _ask(proxy, others)).status == 200
    assert [len(call.inputs) for call in upstream.calls] == [40]


async def _called(upstream, count):
    await until(lambda: len(upstream.calls) >= count)


@pytest.fixture
def with_keys(start_proxy, upstream):
    """Give a function that starts a proxy whose provider is asked with clients' keys."""

    async def start(provider=None, **sections):
        entry = {"base_url": upstream.url, "auth": "client", **(provider or {})}
        return await start_proxy(providers={"openai": entry}, **sections)

    return start


async def _with_key(proxy, key, text):
    bearer = {"Authorization": f"Bearer {key}"}
    body = {"model": "text-embedding-3-small", "input": text}
    return await proxy.post(body, **bearer)


async def test_clients_keys_do_not_queue_for_each_others_connections(with_keys, upstream):
    """As many calls are under way at a time as keys are asked with, more than a hundred too."""
    proxy = await with_keys()
    names = [KEY.format(i) for i in range(110)]
    for key in names:
        assert (await _with_key(proxy, key, "first")).status == 200
    upstream.calls.clear()
    upstream.gate = asyncio.Event()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        proxy.http = session
        tasks = [asyncio.create_task(_with_key(proxy, key, "second")) for key in names]
        await _called(upstream, len(tasks))
        upstream.gate.set()
        assert {reply.status for reply in await asyncio.gather(*tasks)} == {200}
    assert health(proxy).snapshot()["failures"] == {}


async def test_a_due_proof_has_a_time_limit_of_its_own(with_keys, upstream, monkeypatch):
    """What is cached is served to a key that was proved before, however long the provider takes."""
    proxy = await with_keys()
    known = proxy.service._answering._client_keys.proofs
    now = time.time()
    monkeypatch.setattr(known, "_clock", lambda: now)
    await _with_key(proxy, KEY, "a")
    monkeypatch.setattr(client_keys, "PROOF_S", 0.05)
    now += proofs.FRESH_S + 1
    upstream.always = hang()
    async with asyncio.timeout(60):
        reply = await _with_key(proxy, KEY, "a")
    assert (reply.status, reply.headers["x-cache"]) == (200, "hit")
    upstream.calls.clear()
    async with asyncio.timeout(60):
        assert (await _with_key(proxy, KEY, "a")).headers["x-cache"] == "hit"
    assert not upstream.calls
    assert health(proxy).snapshot()["failures_in_a_row"] == 0


async def test_keys_that_cannot_be_proved_hold_up_no_proved_one(with_keys, upstream, monkeypatch):
    """Proofs of unknown keys that hang leave a key that is due its hits."""
    monkeypatch.setattr(client_keys, "MAX_PROVED_AT_ONCE", 2)
    proxy = await with_keys()
    known = proxy.service._answering._client_keys.proofs
    now = time.time()
    monkeypatch.setattr(known, "_clock", lambda: now)
    await _with_key(proxy, KEY, "a")
    monkeypatch.setattr(client_keys, "PROOF_S", 0.05)
    now += proofs.FRESH_S + 1
    upstream.always = hang()
    unknown = [asyncio.create_task(_with_key(proxy, KEY.format(i), "a")) for i in range(20)]
    async with asyncio.timeout(60):
        reply = await _with_key(proxy, KEY, "a")
        replies = await asyncio.gather(*unknown)
    assert (reply.status, reply.headers["x-cache"]) == (200, "hit")
    assert {one.status for one in replies} == {503}
    assert all("Retry-After" in one.headers for one in replies)


REQUEST_S = 100


def _hanging(upstream, **limits):
    """Return the sections under which a request's own time is up long before its provider's."""
    upstream.always = hang()
    provider = {"base_url": upstream.url, "timeout_s": 1e6, "limits": limits}
    return {"server": {"request_timeout_s": REQUEST_S}, "providers": {"openai": provider}}


async def test_a_provider_that_hangs_is_noticed_by_the_requests_own_time(models, upstream, move):
    """Where that is shorter than `timeout_s`, each request that waited for it counts as failed."""
    proxy = await models(**_hanging(upstream))
    for i in range(5):
        asking = asyncio.create_task(_ask(proxy, f"text {i}"))
        await _called(upstream, i + 1)
        await move(REQUEST_S + 1)
        assert (await asking).status == 504
    reply = await _ask(proxy, "text")
    assert (reply.status, len(upstream.calls)) == (503, 5)
    assert (await reply.json())["error"]["code"] == "upstream_unavailable"


async def test_a_wait_in_our_own_queue_is_not_the_providers(models, upstream, move, monkeypatch):
    """Of requests whose time ended, only those count whose calls were at the provider."""
    proxy = await models(**_hanging(upstream, concurrency=1))
    asked = []
    answer = proxy.service.answer
    monkeypatch.setattr(proxy.service, "answer", lambda *one: asked.append(one) or answer(*one))
    asking = [asyncio.create_task(_ask(proxy, "first"))]
    await _called(upstream, 1)
    asking += [asyncio.create_task(_ask(proxy, f"text {i}")) for i in range(8)]
    await until(lambda: len(asked) == len(asking))
    await some_turns()
    await move(REQUEST_S + 1)
    assert {reply.status for reply in await asyncio.gather(*asking)} == {504}
    assert (len(upstream.calls), health(proxy).snapshot()["failures_in_a_row"]) == (1, 1)


async def test_a_client_that_leaves_early_proves_nothing(models, upstream, move):
    """Its call goes on, and is no failure when the time of its request would have been up."""
    proxy = await models(**_hanging(upstream))
    left = [asyncio.create_task(_ask(proxy, f"text {i}")) for i in range(6)]
    await _called(upstream, 1)
    await some_turns()
    for one in left:
        one.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    # Its own time is up after that of all who have left.
    calls = len(upstream.calls)
    patient = asyncio.create_task(_ask(proxy, "patient"))
    await _called(upstream, calls + 1)
    await move(REQUEST_S + 1)
    assert (await patient).status == 504
    assert health(proxy).snapshot()["failures_in_a_row"] == 1


async def test_declared_limits_are_shared_by_the_workers(models, upstream):
    """Each of four workers makes a quarter of the calls at a time."""
    provider = {"base_url": upstream.url, "limits": {"concurrency": 8}}
    proxy = await models(server={"workers": 4}, providers={"openai": provider})
    upstream.gate = asyncio.Event()
    tasks = [
        asyncio.create_task(_ask(proxy, [f"text {i} {j}" for j in range(300)])) for i in range(4)
    ]
    await _called(upstream, 2)
    await some_turns()
    assert len(upstream.calls) == 2
    upstream.gate.set()
    assert {reply.status for reply in await asyncio.gather(*tasks)} == {200}


@pytest.mark.parametrize(("limit", "is_told"), [(3, True), (4, False)])
async def test_too_many_workers_for_a_limit_are_told(limit, is_told, models, upstream, caplog):
    """A worker makes at least one call at a time; where that is too much, the log says so."""
    provider = {"base_url": upstream.url, "limits": {"concurrency": limit}}
    proxy = await models(server={"workers": 4}, providers={"openai": provider})
    assert (await _ask(proxy, "a")).status == 200
    assert ("limits.concurrency is 3, and server.workers 4" in caplog.text) is is_told

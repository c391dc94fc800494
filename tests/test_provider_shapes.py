"""Every ready kind of provider, in its own shape: replies are taken, refusals are explained.

The real proxy is in front of a server that plays bodies, statuses and headers as the provider sends
them (`provider_shapes`). What must follow from each is said here by outcome.
"""

import base64
import logging
from urllib.parse import urlsplit

import numpy as np
import orjson
import pytest
from aiohttp import web
from embedding_proxy.providers import registry
from fault_server import Call, tokens_of, vector_of
from provider_shapes import KEY, REFUSALS, REPLIES, Outcome

INPUTS = ["first text", "second text", "third text"]
BAD = 1
"""The place of the bad input, where one is."""
OTHERS = [text for text in INPUTS if text != INPUTS[BAD]]
WIDTH = 8
OF_ONE_INPUT = {Outcome.INPUT_REFUSED, Outcome.INPUT_FAILS}
OF_ACCOUNT = {Outcome.KEY_REFUSED, Outcome.OUT_OF_CREDIT}
ONE_CALL = OF_ACCOUNT | {Outcome.MODEL_NOT_FOUND, Outcome.QUOTA_EXCEEDED, Outcome.DENIED}
"""What is so whatever the inputs are: one call tells it, and no other one is made to find out."""
LIMITLESS = {"openai", "azure", "openai_compatible"}
"""Kinds whose limit is the client's own, or that of a gateway nobody knows."""
ROUNDS = 6
"""Requests with a bad input, one right after the other."""
MAX_WAIT = 60
"""Seconds that a client is told to wait at most, where the provider names no time to come."""
CODES = {
    Outcome.KEY_REFUSED: {"upstream_auth"},
    Outcome.OUT_OF_CREDIT: {"insufficient_quota"},
    Outcome.QUOTA_EXCEEDED: {"insufficient_quota"},
    Outcome.DENIED: {"upstream_permission_denied"},
    Outcome.RATE_LIMITED: {"rate_limit_exceeded"},
    Outcome.MODEL_NOT_FOUND: {"model_not_found"},
    Outcome.INPUT_REFUSED: {None},
    Outcome.INPUT_FAILS: {"upstream_error"},
    Outcome.UPSTREAM_FAULT: {"upstream_error", "upstream_invalid_answer"},
}
"""The `code` that a client may get, beside the provider's own."""


def statuses(shape):
    """Return the statuses that a client may get for a refusal."""
    if shape.answer is not None:
        return {shape.answer}
    return {
        Outcome.KEY_REFUSED: {403},
        Outcome.OUT_OF_CREDIT: {402, 429},
        Outcome.QUOTA_EXCEEDED: {402, 429},
        Outcome.DENIED: {403},
        Outcome.RATE_LIMITED: {429},
        Outcome.MODEL_NOT_FOUND: {404, shape.status},
        Outcome.INPUT_REFUSED: {400, shape.status},
        Outcome.INPUT_FAILS: {400, 502},
        Outcome.UPSTREAM_FAULT: {shape.status if shape.status in (503, 504) else 502},
    }[shape.outcome]


def of(*outcomes):
    """Run a test for the refusals with these outcomes, or for all but the batches too large."""
    shapes = [
        shape
        for shape in REFUSALS
        if (shape.outcome in outcomes if outcomes else shape.outcome is not Outcome.BATCH_TOO_LARGE)
    ]
    return pytest.mark.parametrize("shape", shapes, ids=[shape.id for shape in shapes])


def answering(name):
    """Play the reply of that name, with the right vectors."""
    reply = REPLIES[name]

    async def act(_request, payload):
        inputs = Call("", {}, payload).inputs
        vectors = [vector_of(payload["model"], text, WIDTH) for text in inputs]
        in_base64 = payload.get("encoding_format") == "base64"
        embeddings = [
            base64.b64encode(vector.tobytes()).decode() if in_base64 else vector.tolist()
            for vector in vectors
        ]
        body = reply.body(payload["model"], embeddings, sum(map(tokens_of, inputs)))
        return web.Response(
            status=reply.status,
            body=reply.start + orjson.dumps(body),
            content_type="application/json",
            headers=reply.headers,
        )

    return act


def refusing(shape):
    """Play a refusal; a call that is small enough for it gets the right reply."""
    body = shape.body.encode() if isinstance(shape.body, str) else orjson.dumps(shape.body)
    right = answering(shape.kind)

    async def act(request, payload):
        if len(Call("", {}, payload).inputs) <= (shape.max_inputs or 0):
            return await right(request, payload)
        return web.Response(
            status=shape.status, body=body, content_type=shape.content_type, headers=shape.headers
        )

    return act


class World:
    """A provider of some kind, alone and before another one, and one that tells what is cached."""

    def __init__(self, start_proxy, monkeypatch, upstream, second):
        monkeypatch.setenv("SHAPES_API_KEY", KEY)
        self._start_proxy = start_proxy
        self.upstream = upstream
        self.second = second
        second.widths["m"] = WIDTH

    async def start(self, kind, **limits):
        """Start a proxy whose provider of that kind answers as such a provider should."""
        path = urlsplit(registry.KINDS[kind].profile.base_url or "http://any/v1").path
        self.path = f"{path}/embeddings"
        self.upstream.always = answering(kind)
        plain = {"kind": "openai_compatible", "base_url": self.second.url}
        first = {
            "kind": kind,
            "base_url": self.upstream.url.removesuffix("/v1") + path,
            "api_key_env": "SHAPES_API_KEY",
            "limits": limits,
        }
        routes = {"alone": ["first"], "both": ["first", "second"], "cached": ["second"]}
        self.proxy = await self._start_proxy(
            providers={"first": first, "second": plain},
            models={
                name: {
                    # What `cached` is asked for, and `alone` has bought, is a hit.
                    "space": "both" if name == "both" else "alone",
                    "dimensions": WIDTH,
                    "routes": [{"provider": provider, "model": "m"} for provider in providers],
                }
                for name, providers in routes.items()
            },
        )

    async def ask(self, model, inputs=INPUTS):
        """Send one request, in floats."""
        return await self.proxy.post({"model": model, "input": inputs, "encoding_format": "float"})

    def refuse(self, shape):
        """Let the provider refuse calls so: all, or those with the bad input."""
        if shape.outcome in OF_ONE_INPUT:
            self.upstream.holding = {INPUTS[BAD]: refusing(shape)}
        else:
            self.upstream.always = refusing(shape)


@pytest.fixture
def world(start_proxy, monkeypatch, upstream, second):
    return World(start_proxy, monkeypatch, upstream, second)


async def right(response, inputs=INPUTS, hits=None):
    """Check that a reply holds the right vectors in the right order, and so many cached ones."""
    assert response.status == 200, await response.text()
    items = (await response.json())["data"]
    assert [item["index"] for item in items] == list(range(len(inputs)))
    for item, text in zip(items, inputs, strict=True):
        assert np.array_equal(np.array(item["embedding"], "<f4"), vector_of("m", text, WIDTH))
    if hits is not None:
        assert int(response.headers["x-cache-hits"]) == hits


async def explained(response, shape):
    """Check that a client is told what is wrong, in the provider's words, and what to do next."""
    text = await response.text()
    said = orjson.loads(text)["error"]
    assert said.keys() == {"message", "type", "param", "code"}
    assert response.status in statuses(shape), said
    assert said["code"] in CODES[shape.outcome] | {shape.code} - ({None} if shape.code else set())
    assert shape.reason in said["message"]
    assert KEY not in text
    if shape.outcome in OF_ONE_INPUT:
        assert said["message"].endswith(f"(input {BAD})")
        assert said["param"] == "input"
    is_passing = shape.outcome in {Outcome.RATE_LIMITED, Outcome.UPSTREAM_FAULT}
    if is_passing and shape.status != 501:
        assert int(response.headers["Retry-After"]) <= (shape.wait or 0) + MAX_WAIT
        assert "x-should-retry" not in response.headers
    elif shape.outcome is not Outcome.INPUT_FAILS:
        assert response.headers["x-should-retry"] == "false"
        assert "Retry-After" not in response.headers
    if shape.wait is not None:
        assert int(response.headers["Retry-After"]) == -(-shape.wait // 1)


def test_every_kind_has_its_shapes():
    """Each kind has a reply, and refusals of three kinds or more, each under a name of its own."""
    assert {name.partition("-")[0] for name in REPLIES} == {*registry.KINDS}
    for kind in registry.KINDS:
        outcomes = {shape.outcome for shape in REFUSALS if shape.kind == kind}
        assert len(outcomes) >= 3, kind
    assert len({shape.id for shape in REFUSALS}) == len(REFUSALS)


@pytest.mark.parametrize("name", REPLIES)
async def test_a_reply_is_accepted(name, world):
    """Each reply of a kind gives the right vectors, for several inputs and for one, once bought."""
    await world.start(name.partition("-")[0])
    world.upstream.always = answering(name)
    response = await world.ask("both")
    await right(response)
    assert response.headers["x-embedding-provider"] == "first"
    await right(await world.ask("both", ["one more"]), ["one more"], 0)
    await right(await world.ask("both", [*INPUTS, "one more"]), [*INPUTS, "one more"], 4)
    assert [call.path for call in world.upstream.calls] == [world.path] * 2
    assert not world.second.calls


@of()
async def test_a_refusal_is_explained_and_leads_to_the_next_route(shape, world, caplog):
    """The client is told the provider's reason; nothing wrong is cached, and no call is wasted.

    What another provider may do better goes there; a bad input goes nowhere else.
    """
    caplog.set_level(logging.INFO)
    await world.start(shape.kind)
    world.refuse(shape)
    response = await world.ask("alone")
    await explained(response, shape)
    if shape.status == 404 and shape.name.startswith("wrong-path"):
        assert world.path in (await response.json())["error"]["message"]
    if shape.outcome in ONE_CALL:
        assert len(world.upstream.calls) == 1
    if shape.outcome not in OF_ONE_INPUT:
        # Who reads the log learns the same.
        assert shape.reason in caplog.text
    assert KEY not in caplog.text
    bought = len(OTHERS) if shape.outcome in OF_ONE_INPUT else 0
    await right(await world.ask("cached"), hits=bought)

    # As if nothing had been asked before.
    world.proxy.service.upstreams._healths.clear()
    world.upstream.calls.clear()
    world.second.calls.clear()
    response = await world.ask("both")
    if shape.outcome is Outcome.INPUT_REFUSED:
        assert response.status in statuses(shape)
        assert not world.second.calls
        return
    await right(response)
    # A 500 may be the provider's own: the next route is asked for the whole batch at once.
    assert set(world.second.inputs) == set(INPUTS)
    if shape.outcome in OF_ACCOUNT:
        calls = len(world.upstream.calls)
        await right(await world.ask("both", ["later"]), ["later"])
        assert len(world.upstream.calls) == calls == 1


@of(*OF_ONE_INPUT)
async def test_a_bad_input_is_not_held_against_the_provider(shape, world):
    """After many bad inputs the provider is asked for good ones as before."""
    await world.start(shape.kind)
    world.refuse(shape)
    for i in range(ROUNDS):
        response = await world.ask("alone", [f"good text {i}", INPUTS[BAD]])
        assert response.status in statuses(shape)
    await right(await world.ask("alone", OTHERS), OTHERS)


@of(Outcome.BATCH_TOO_LARGE)
async def test_a_batch_that_is_too_large_is_divided(shape, world):
    """The client does not notice that the provider takes less in a call than is declared."""
    await world.start(
        # Without the requests per minute, a call would be cut smaller for speed.
        shape.kind,
        inputs=5000,
        tokens=None,
        concurrency=1,
        requests_per_minute=10**6,
    )
    world.refuse(shape)
    inputs = [f"text {i}" for i in range(shape.max_inputs + 2)]
    await right(await world.ask("both", inputs), inputs)
    sizes = [len(call.inputs) for call in world.upstream.calls]
    assert max(sizes) > shape.max_inputs
    assert len(sizes) <= 5
    assert not world.second.calls


@pytest.mark.parametrize(
    "shape",
    [
        shape
        for shape in REFUSALS
        if shape.name == "batch-too-large" and shape.kind not in LIMITLESS
    ],
    ids=lambda shape: shape.kind,
)
def test_the_declared_limit_is_the_providers(shape):
    """No call is larger than the provider says that it takes, so that none is refused for it."""
    assert registry.KINDS[shape.kind].profile.limits.inputs == shape.max_inputs

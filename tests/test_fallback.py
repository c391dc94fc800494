"""A model of another space stands in where the operator wrote it down, and nowhere else."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from clock import until
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Settings
from fault_server import hang, status, vector_of

MODEL = "text-embedding-3-small"
OTHER = "mistralai/mistral-embed-2312"
WIDTHS = {OTHER: 1024}


def _models(**fallback):
    return {MODEL: {"fallback": {"model": OTHER, **fallback}}}


async def _start(start_proxy, upstream, second, models):
    """Start a proxy whose first provider serves the model, and whose second serves the other."""
    second.widths = WIDTHS
    models[MODEL]["routes"] = [{"provider": "openai", "model": MODEL}]
    return await start_proxy(openai=upstream, openrouter=second, models=models)


async def _embed(proxy, text, **fields):
    reply = await proxy.post({"model": MODEL, "input": text, **fields})
    body = await reply.json()
    data = body.get("data", [])
    return reply, [np.array(item["embedding"], dtype=np.float32) for item in data]


async def test_refused_by_default(upstream, second, start_proxy):
    """Without `fallback` nobody stands in, though another provider would answer."""
    upstream.always = status(500)
    models = {MODEL: {}}
    proxy = await _start(start_proxy, upstream, second, models)
    reply, _ = await _embed(proxy, "a")
    assert (reply.status, len(second.calls)) == (502, 0)


async def test_labelled_padded_and_kept_apart(upstream, second, start_proxy):
    """It says whose vectors they are, is cached as those, and gives way when the first is back."""
    proxy = await _start(start_proxy, upstream, second, _models(dimension_policy="pad"))
    upstream.always = status(404)
    for verdict in ("miss", "hit"):
        reply, (got,) = await _embed(proxy, "a")
        assert (reply.status, reply.headers["x-embedding-fallback"]) == (200, "true")
        assert reply.headers["x-embedding-space"] == "mistralai/mistral-embed-2312"
        assert reply.headers["x-cache"] == verdict
        assert (await reply.json())["model"] == MODEL
        assert got.shape == (1536,)
        assert np.array_equal(got[:1024], vector_of(OTHER, "a", 1024))
        assert not got[1024:].any()
    assert len(second.calls) == 1
    reply = await proxy.post({"model": OTHER, "input": "a"})
    assert reply.headers["x-cache"] == "hit"
    assert "x-embedding-fallback" not in reply.headers
    upstream.always = None
    reply, (got,) = await _embed(proxy, "a")
    assert reply.headers["x-cache"] == "miss"
    assert reply.headers["x-embedding-space"] == "openai/text-embedding-3-small"
    assert "x-embedding-fallback" not in reply.headers
    assert np.array_equal(got, vector_of(MODEL, "a"))


async def test_one_answer_is_of_one_space(upstream, second, start_proxy):
    """With half of a request in the first model's cache, all of it comes from the other model."""
    proxy = await _start(start_proxy, upstream, second, _models(dimension_policy="pad"))
    await _embed(proxy, "known")
    upstream.always = status(500)
    reply, got = await _embed(proxy, ["known", "new"])
    assert reply.headers["x-embedding-fallback"] == "true"
    for vector, text in zip(got, ("known", "new"), strict=True):
        assert np.array_equal(vector[:1024], vector_of(OTHER, text, 1024))
    reply, (got,) = await _embed(proxy, "known")
    assert "x-embedding-fallback" not in reply.headers
    assert np.array_equal(got, vector_of(MODEL, "known"))


@pytest.mark.parametrize("policy", ["strict", "truncate"])
async def test_cut_to_the_width_that_was_asked_for(policy, upstream, second, start_proxy):
    """`truncate` cuts and renormalises what is not made for it; `strict` then has no answer."""
    models = {MODEL: {"fallback": {"model": "text-embedding-ada-002", "dimension_policy": policy}}}
    models["text-embedding-ada-002"] = {"routes": [{"provider": "openrouter", "model": "ada"}]}
    proxy = await _start(start_proxy, upstream, second, models)
    upstream.always = status(500)
    reply, got = await _embed(proxy, "a", dimensions=512)
    if policy == "strict":
        assert (reply.status, len(second.calls)) == (502, 0)
        return
    assert (reply.status, reply.headers["x-embedding-fallback"]) == (200, "true")
    head = vector_of("ada", "a")[:512].astype(np.float64)
    assert np.allclose(got[0], head / np.linalg.norm(head), atol=1e-7)


async def test_refused_inputs_are_nobody_elses(upstream, second, start_proxy):
    """What the first model's provider refuses is wrong in itself, and no other model is asked."""
    proxy = await _start(start_proxy, upstream, second, _models(dimension_policy="pad"))
    upstream.always = status(400)
    reply, _ = await _embed(proxy, "a")
    assert (reply.status, len(second.calls)) == (400, 0)


async def test_the_first_models_failure_is_what_is_told(upstream, second, start_proxy):
    """When nobody answers, the client hears of the model it asked for."""
    proxy = await _start(start_proxy, upstream, second, _models(dimension_policy="pad"))
    upstream.always, second.always = status(503), status(404)
    reply, _ = await _embed(proxy, "a")
    assert reply.status == 503
    assert "openai" in (await reply.json())["error"]["message"]
    assert second.calls


async def test_a_field_that_the_other_model_does_not_know(upstream, start_proxy):
    """A stand-in that cannot take the request leaves the first model's failure standing."""
    models = {MODEL: {"fallback": {"model": "wordllama-embed", "dimension_policy": "pad"}}}
    proxy = await start_proxy(openai=upstream, models=models)
    upstream.always = status(500)
    reply, _ = await _embed(proxy, "a", input_type="query")
    assert (reply.status, "made-up 500" in await reply.text()) == (502, True)


async def test_without_a_key_the_other_answers(start_proxy):
    """No key for the first provider is an outage too, for those who wrote a fallback down."""
    models = {MODEL: {"fallback": {"model": "wordllama-embed", "dimension_policy": "pad"}}}
    proxy = await start_proxy(models=models)
    reply, (got,) = await _embed(proxy, "a")
    assert (reply.status, got.shape) == (200, (1536,))
    assert reply.headers["x-embedding-space"] == "wordllama/l2-supercat-256"


async def test_a_hanging_provider_leaves_time_for_the_other(upstream, second, start_proxy, move):
    """Half of the request's time is the stand-in's, however long the first provider hangs."""
    second.widths = WIDTHS
    upstream.always = hang()
    models = _models(dimension_policy="pad")
    models[MODEL]["routes"] = [{"provider": "openai", "model": MODEL}]
    server = {"request_timeout_s": 200}
    servers = {"openai": upstream, "openrouter": second}
    proxy = await start_proxy(**servers, models=models, server=server)
    for route in proxy.service.models[MODEL].router.routes:
        transport = route.provider._transport
        transport._timeouts = replace(transport._timeouts, total_s=1e6)
    asking = asyncio.create_task(_embed(proxy, "a"))
    await until(lambda: upstream.calls)
    await move(101)
    reply, _ = await asking
    assert (reply.status, reply.headers.get("x-embedding-fallback")) == (200, "true")


async def test_in_python_too(upstream, second, start_proxy):
    """The service says whose vectors they are; their width is that of the model asked for."""
    proxy = await _start(start_proxy, upstream, second, _models(dimension_policy="pad"))
    upstream.always = status(500)
    result = await proxy.service.embed(["a"], model=MODEL)
    assert result.fallback
    assert (result.model.name, result.space.name) == (MODEL, "mistralai/mistral-embed-2312")
    assert result.vectors.shape == (1, 1536)


@pytest.mark.parametrize(
    ("fallback", "problem"),
    [
        (OTHER, "gives 1024 numbers where 1536 are asked for; say `dimension_policy: pad`"),
        ({"model": "text-embedding-3-large"}, None),
        ({"model": "text-embedding-ada-002"}, None),
        ({"model": "qwen/qwen3-embedding-8b"}, None),
        ("openai/text-embedding-3-small", "has the same space; add its routes"),
        ("nowhere", "there is no model of that name"),
        ({"model": OTHER, "dimension_policy": "stretch"}, "dimension_policy"),
        ([OTHER, "nowhere"], "dimension_policy: pad"),
    ],
)
def test_what_can_stand_in_is_said_at_the_start(fallback, problem):
    """A configuration that could never answer is refused, with what to write instead."""
    sections = {"models": {MODEL: {"fallback": fallback}}}
    if problem is None:
        assert Settings.model_validate(sections).models[MODEL].fallback
        return
    with pytest.raises((ConfigError, ValueError), match=problem):
        Settings.model_validate(sections)

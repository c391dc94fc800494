"""GET /v1/models: OpenAI's shape, and only what can be asked for."""

import asyncio
import gzip
import itertools

import openai
import pytest
from aiohttp import web
from clock import until
from embedding_proxy.proxy.http import passthrough_upstream

SMALL = "text-embedding-3-small"


async def test_the_list_holds_the_usable_models_by_name(upstream, start_proxy):
    """Models of configured providers are listed, sorted; others, whose key is absent, are not."""
    proxy = await start_proxy(openai=upstream)
    listed = await proxy.client.models.list()
    names = [model.id for model in listed.data]
    assert names == sorted(names)
    assert {SMALL, f"openai/{SMALL}", "wordllama-embed"} <= set(names)
    assert "baai/bge-m3" not in names
    assert not upstream.calls


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/models", "/models/"])
async def test_the_list_has_openais_shape(path, start_proxy):
    """With or without /v1 and a slash at the end, each model has OpenAI's four fields."""
    proxy = await start_proxy(providers={"openai": None})
    async with proxy.http.get(proxy.url.removesuffix("/v1") + path) as response:
        assert await response.json() == {
            "object": "list",
            "data": [
                {
                    "id": "wordllama-embed",
                    "object": "model",
                    "created": 0,
                    "owned_by": "wordllama",
                }
            ],
        }


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (SMALL, SMALL),
        (f"openai/{SMALL}", f"openai/{SMALL}"),
        (f"openai%2F{SMALL}", f"openai/{SMALL}"),
    ],
)
async def test_one_model_is_found_by_its_name(path, name, upstream, start_proxy):
    """A model is found by its name, slashes in it included, escaped or not, by all aliases."""
    proxy = await start_proxy(openai=upstream)
    for prefix, slash in itertools.product(("/v1", ""), ("/", "")):
        url = f"{proxy.url.removesuffix('/v1')}{prefix}/models/{path}{slash}"
        async with proxy.http.get(url) as response:
            assert (response.status, (await response.json())["id"]) == (200, name)


async def test_the_official_client_finds_a_model_with_a_slash(upstream, start_proxy):
    """The openai client's way of asking for one model works for names of both sorts."""
    proxy = await start_proxy(openai=upstream)
    for name in (SMALL, f"openai/{SMALL}"):
        assert (await proxy.client.models.retrieve(name)).id == name


@pytest.mark.parametrize("name", ["nope", "baai/bge-m3", "text-embedding-3", f"{SMALL}/x"])
async def test_a_model_that_cannot_be_asked_for_is_not_found(name, upstream, start_proxy):
    """An unknown model, and one whose provider is not configured, get OpenAI's 404."""
    proxy = await start_proxy(openai=upstream)
    with pytest.raises(openai.NotFoundError, match=name) as caught:
        await proxy.client.models.retrieve(name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def _lists(*ids, **more):
    async def act(request: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "created": 7, "owned_by": "them"} for name in ids]
        return web.json_response({"object": "list", "data": [*data, *more.get("odd", ())]})

    return act


async def test_the_upstreams_models_follow_ours(other, start_proxy):
    """Where calls are passed to a provider, its models are listed too, each name once."""
    other.act = _lists("gpt-x", SMALL, odd=[{"id": None}, "gpt-y", {}])
    proxy = await start_proxy(openai=other, passthrough="openai")
    ours = [model.id async for model in (await start_proxy(openai=other)).client.models.list()]
    listed = (await proxy.client.models.list()).data
    assert [model.id for model in listed] == [*ours, "gpt-x"]
    assert (listed[-1].created, listed[-1].owned_by) == (7, "them")
    assert [(call.method, call.target) for call in other.seen] == [("GET", "/v1/models")]
    assert other.seen[0].headers["Authorization"] == "Bearer openai-secret-key"


async def test_a_compressed_list_is_read(other, start_proxy):
    """An upstream may compress its list though nobody asked for that."""

    async def act(_: web.Request) -> web.Response:
        body = gzip.compress(b'{"data": [{"id": "gpt-x"}]}')
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    other.act = act
    proxy = await start_proxy(openai=other, passthrough="openai")
    async with proxy.http.get(f"{proxy.url}/models") as response:
        assert (await response.json())["data"][-1] == {"id": "gpt-x"}


def _answers(status: int, body: bytes):
    async def act(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    return act


async def _aborts(request: web.Request) -> web.Response:
    request.transport.abort()
    return web.Response()


async def _hangs(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError("never")


SILENT = {
    "refuses": _answers(401, b'{"data": [{"id": "no"}]}'),
    "redirects": _answers(302, b'{"data": [{"id": "no"}]}'),
    "is no JSON": _answers(200, b"<html>"),
    "is no list": _answers(200, b'{"data": {"id": "no"}}'),
    "is an array": _answers(200, b'[{"id": "no"}]'),
    "is endless": _answers(200, b'{"data": [{"id": "no"}]}'.ljust(1000)),
    "breaks off": _aborts,
    "hangs": _hangs,
}


@pytest.mark.parametrize("act", SILENT.values(), ids=SILENT)
async def test_an_upstreams_trouble_leaves_our_models(act, other, start_proxy, monkeypatch, move):
    """Whatever keeps the upstream from listing, ours are listed, and soon."""
    monkeypatch.setattr(passthrough_upstream, "_LIST_SECONDS", 100)
    monkeypatch.setattr(passthrough_upstream, "_LIST_BYTES", 900)
    other.act = act
    proxy = await start_proxy(openai=other, passthrough="openai")
    listing = asyncio.create_task(proxy.http.get(f"{proxy.url}/models"))
    await until(lambda: other.seen)
    if act is _hangs:
        await move(101)
    names = [one["id"] for one in (await (await listing).json())["data"]]
    assert SMALL in names
    assert "no" not in names
    assert len(other.seen) == 1


async def test_a_model_that_is_not_ours_is_asked_of_the_upstream(other, start_proxy):
    """A model we do not know is looked up, or deleted, where other calls go; ours are not."""

    async def act(request: web.Request) -> web.Response:
        one = {"id": request.path.rpartition("/")[2], "object": "model", "deleted": True}
        return web.json_response({**one, "created": 7, "owned_by": "them"})

    other.act = act
    proxy = await start_proxy(openai=other, passthrough="openai")
    assert (await proxy.client.models.retrieve("gpt-x")).owned_by == "them"
    assert (await proxy.client.models.retrieve(SMALL)).owned_by == "openai"
    assert (await proxy.client.models.delete("ft:gpt-x")).deleted
    async with proxy.http.get(proxy.url.removesuffix("/v1") + "/models/gpt-y") as response:
        assert (await response.json())["id"] == "gpt-y"
    assert [call.target for call in other.seen] == [
        "/v1/models/gpt-x",
        "/v1/models/ft:gpt-x",
        "/v1/models/gpt-y",
    ]

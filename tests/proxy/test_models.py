"""GET /v1/models: OpenAI's shape, and only what can be asked for."""

import itertools

import openai
import pytest

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

"""OpenRouter's adapter: floats asked, the application named, errors read inside a 200 too."""

from dataclasses import replace

import orjson
import pytest
from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.errors import (
    AuthenticationError,
    InvalidAnswer,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    QuotaExceeded,
    RateLimited,
    UpstreamError,
)
from embedding_proxy.providers.upstream.content_encoding import ACCEPT_ENCODING
from embedding_proxy.providers.vendors import OpenRouter
from fault_server import vector_of

URL = "https://openrouter.ai/api/v1/embeddings"
MODEL = "baai/bge-m3"
SPACE = Space(MODEL, 1024)


async def ask(inputs, space=SPACE, profile=OpenRouter.profile):
    """Ask OpenRouter once; no socket is opened."""
    async with OpenRouter("openrouter", profile, api_key="sk-or-made-up") as provider:
        return await provider.ask(MODEL, space, inputs, Context())


def reply_to(*inputs):
    """Return OpenRouter's answer: as OpenAI's, with fields of its own, usage optional."""
    data = [
        {"object": "embedding", "index": i, "embedding": vector_of(MODEL, item, 1024).tolist()}
        for i, item in enumerate(inputs)
    ]
    return {"id": "gen-1", "object": "list", "data": data, "model": MODEL, "provider": "Acme"}


async def test_the_request_is_openrouters(mocked_http):
    """One POST with the key and our name; floats are asked, and extra fields go along."""
    mocked_http.post(URL, payload=reply_to("a"))
    await ask(["a"], SPACE.with_parameters({"provider": {"order": ["acme"]}}))
    ((key, (call,)),) = mocked_http.requests.items()
    assert (key[0], str(key[1])) == ("POST", URL)
    assert orjson.loads(call.kwargs["data"].decode()) == {
        "model": MODEL,
        "input": ["a"],
        "encoding_format": "float",
        "provider": {"order": ["acme"]},
    }
    assert call.kwargs["headers"] == {
        "Accept-Encoding": ACCEPT_ENCODING,
        "Authorization": "Bearer sk-or-made-up",
        "Content-Type": "application/json",
        "X-Title": "embedding-proxy",
    }


@pytest.mark.parametrize(
    ("usage", "counts"),
    [({}, [1, 2]), ({"usage": {"prompt_tokens": 32, "cost": 1e-7}}, [10, 22])],
)
async def test_the_answer_needs_no_usage(usage, counts, mocked_http):
    """Without a usage tokens are estimated, with one it is shared; neither is exact."""
    mocked_http.post(URL, payload={**reply_to("hello", "hello world"), **usage})
    got = await ask(["hello", "hello world"])
    right = [vector_of(MODEL, item, 1024).tobytes() for item in ("hello", "hello world")]
    assert list(got.vectors) == right
    assert (list(got.tokens), got.counted, got.providers) == (counts, False, ("openrouter",))


@pytest.mark.parametrize("inside", [False, True], ids=["by status", "inside a 200"])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (400, InvalidRequest),
        (401, AuthenticationError),
        (402, QuotaExceeded),
        (403, PermissionDenied),
        (404, ModelNotFound),
        (408, UpstreamError),
        (413, InvalidRequest),
        (429, RateLimited),
        (500, UpstreamError),
        (502, UpstreamError),
        (503, UpstreamError),
        (524, UpstreamError),
        (529, UpstreamError),
    ],
)
async def test_openrouters_errors_are_told_apart(code, error, inside, mocked_http):
    """The integer code in the body decides, whether or not the status says the same."""
    body = {"error": {"code": code, "message": "made up", "metadata": {"provider_name": None}}}
    mocked_http.post(URL, status=200 if inside else code, payload=body)
    with pytest.raises(error) as caught:
        await ask(["a"])
    assert type(caught.value) is error
    said = caught.value if error is InvalidRequest else caught.value.refusal
    assert (said.status, said.code) == (code, None)
    assert "made up" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [[], [{"object": "embedding", "index": 0, "embedding": []}]],
    ids=["no embedding", "an empty one"],
)
async def test_an_empty_answer_is_refused(data, mocked_http):
    """A 200 without numbers is no answer."""
    mocked_http.post(URL, payload={**reply_to("a"), "data": data})
    with pytest.raises(InvalidAnswer):
        await ask(["a"])


async def test_a_width_that_was_not_asked_for_is_refused(mocked_http):
    """OpenRouter drops what a model does not support in silence, so every width is checked."""
    mocked_http.post(URL, payload=reply_to("a"))
    with pytest.raises(InvalidAnswer, match="1024 dimensions instead of 768"):
        await ask(["a"], Space(MODEL, 768))


ROUTING = {"order": ["openai"], "allow_fallbacks": False}


async def test_the_configured_routing_is_sent(mocked_http):
    """Routing preferences of the configuration go along; they are no part of the space."""
    mocked_http.post(URL, payload=reply_to("a"))
    await ask(["a"], profile=replace(OpenRouter.profile, options={"provider": ROUTING}))
    ((_, (call,)),) = mocked_http.requests.items()
    assert orjson.loads(call.kwargs["data"].decode())["provider"] == ROUTING


async def test_a_client_does_not_undo_the_configured_routing(mocked_http):
    """Where the operator says who may compute, a client's own word is refused, not merged."""
    profile = replace(OpenRouter.profile, options={"provider": ROUTING})
    space = SPACE.with_parameters({"provider": {"order": ["acme"]}})
    with pytest.raises(InvalidRequest, match="`provider` is set by the configuration") as caught:
        await ask(["a"], space, profile)
    assert caught.value.param == "provider"
    assert not mocked_http.requests
